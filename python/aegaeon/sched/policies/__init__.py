"""The policies, one per file, and their names in `pool.yaml`."""

from collections.abc import Callable

from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.sched.scheduler import Policy

POLICIES: dict[str, Callable[[int], Policy]] = {"round-robin": RoundRobin}


def make_policy(name: str, *, quantum: int = 8) -> Policy:
    """The policy called `name`; `quantum` is the longest turn of round robin, in engine steps."""
    try:
        factory = POLICIES[name]
    except KeyError:
        known = ", ".join(sorted(POLICIES))
        raise ValueError(f"unknown scheduling policy {name!r}; known: {known}") from None
    return factory(quantum)
