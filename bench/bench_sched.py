"""What does a decision of the scheduler cost?

    pytest bench/bench_sched.py           (with --keep-results the figures go to results/)

The step loop runs turn after turn over engines that take no time, each with many open requests.
Timed are the policy alone and the whole turn: polling the engines, summing up the requests of the
model that ran, the state, the decision. Processor time, as a decision waits for nothing.

Limit: one look at each model, and one at each request of the model that ran. Goal: 1 ms for 100
models and 10,000 requests, linear or better in both.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from aegaeon.core.clock import ManualClock
from aegaeon.core.config import Slo
from aegaeon.core.engine import EngineLoad, EngineRequest
from aegaeon.sched.policies import make_policy
from aegaeon.sched.scheduler import Policy, PoolState, Turn
from aegaeon.sched.step_loop import StepLoop

STEP_S = 0.01
MODEL_BYTES = 1 << 30
TURNS = 200


class Model:
    """An engine that takes no time: each step is a token of every request."""

    def __init__(self, name: str, num_requests: int, clock: ManualClock, dice: random.Random):
        self.name = name
        self._clock = clock
        self._requests = [
            EngineRequest(f"{name}-{i}", dice.randint(10, 4000), 0, i >= 2)
            for i in range(num_requests)
        ]

    def poll(self) -> None:
        pass

    def load(self) -> EngineLoad:
        waiting = min(2, len(self._requests))
        return EngineLoad(len(self._requests) - waiting, waiting)

    def requests(self) -> list[EngineRequest]:
        return self._requests

    def has_work(self) -> bool:
        return bool(self._requests)

    def run_step(self) -> bool:
        self._clock.advance(STEP_S)
        return True

    def fail(self, error: BaseException) -> None:
        raise error


class Slots:
    """Room for an eighth of the models."""

    def __init__(self, names: Sequence[str]) -> None:
        self._room = max(1, len(names) // 8)
        self._resident: dict[str, None] = {}

    def is_resident(self, name: str) -> bool:
        return name in self._resident

    def missing_bytes(self, name: str) -> int:
        return 0 if name in self._resident else MODEL_BYTES

    def activate(self, name: str, evict_first: Sequence[str] = ()) -> None:
        if name not in self._resident and len(self._resident) == self._room:
            del self._resident[
                next(n for n in (*evict_first, *self._resident) if n in self._resident)
            ]
        self._resident[name] = None

    def prefetch(self, name: str) -> bool:
        return False

    def weights_bytes(self, name: str) -> int:
        return 1000

    def let_go(self, name: str) -> None:
        pass


@dataclass
class Timed:
    """`policy`, timed; its turns are cut to one step, as the requests of a `Model` never end."""

    policy: Policy
    seconds: list[float]

    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        began = time.thread_time()
        turn = self.policy.next_turn(state, now)
        self.seconds.append(time.thread_time() - began)
        return turn and replace(turn, max_steps=1)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize(
    ("models", "requests"), [(10, 10_000), (100, 10_000), (1000, 10_000), (100, 100_000)]
)
@pytest.mark.parametrize("policy", ["slack", "paper", "fcfs", "request-level", "round-robin"])
def test_a_decision(benchmark, record, policy, models, requests):
    dice, clock = random.Random(0), ManualClock()
    names = [f"model-{i:04d}" for i in range(models)]
    timed = Timed(make_policy(policy, quantum=1), [])
    loop = StepLoop(policy=timed, residency=Slots(names), clock=clock)
    for name in names:
        loop.add(Model(name, requests // models, clock, dice), slo=Slo())
    assert loop.run_turn()
    assert loop.seen is not None
    state, _ = loop.seen
    assert sum(view.num_running + view.num_waiting for view in state.models) == requests
    timed.seconds.clear()

    benchmark.pedantic(loop.run_turn, rounds=TURNS, warmup_rounds=5)

    turns_s = benchmark.stats.stats.data if benchmark.stats else timed.seconds
    record(
        f"{policy}, {models} models, {requests} requests",
        benchmark,
        decision_us=statistics.median(timed.seconds) * 1e6,
        turn_us=statistics.median(turns_s) * 1e6,
    )
