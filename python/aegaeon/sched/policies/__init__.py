"""The policies, one per file, and their names in `pool.yaml`."""

from collections.abc import Callable

from aegaeon.sched.policies.fcfs import Fcfs
from aegaeon.sched.policies.paper import Paper
from aegaeon.sched.policies.request_level import RequestLevel
from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.sched.policies.slack import Slack
from aegaeon.sched.policies.static import Static
from aegaeon.sched.scheduler import Policy

POLICIES: dict[str, Callable[[int], Policy]] = {
    "round-robin": RoundRobin,
    "slack": lambda quantum: Slack(),
    "paper": lambda quantum: Paper(),
    "request-level": lambda quantum: RequestLevel(),
    "static": lambda quantum: Static(),
    "fcfs": Fcfs,
}


def make_policy(name: str, *, quantum: int = 8) -> Policy:
    """The policy called `name`; `quantum` is the longest turn, in engine steps, of those that count
    steps (round-robin, fcfs).
    """
    try:
        factory = POLICIES[name]
    except KeyError:
        known = ", ".join(sorted(POLICIES))
        raise ValueError(f"unknown scheduling policy {name!r}; known: {known}") from None
    return factory(quantum)
