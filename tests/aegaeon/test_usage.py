"""Who had the device: totals and slices, and what the step loop reports."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from aegaeon.core.clock import ManualClock
from aegaeon.core.config import Slo
from aegaeon.core.engine import EngineLoad, EngineRequest
from aegaeon.core.errors import AegaeonError
from aegaeon.sched.meter import Meter
from aegaeon.sched.metrics import LoopCollector
from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.sched.step_loop import StepLoop
from aegaeon.sched.usage import DeviceUsage

SECONDS = st.floats(0, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), SECONDS, SECONDS, SECONDS), max_size=20))
def test_slices_add_up_to_the_totals(turns):
    usage = DeviceUsage(slice_s=0.5, num_slices=1000)
    now = 0.0
    for model, idle_s, switch_s, step_s in turns:
        began_s = now + idle_s
        now = began_s + switch_s + step_s
        usage.add(model, began_s=began_s, switched_s=began_s + switch_s, ended_s=now, num_steps=1)
    numbers = [number for number, _ in usage.slices()]
    assert numbers == sorted(set(numbers))
    for name, total in usage.totals().items():
        shares = [each[name] for _, each in usage.slices() if name in each]
        assert sum(share.switch_s for share in shares) == pytest.approx(total.switch_s)
        assert sum(share.step_s for share in shares) == pytest.approx(total.step_s)
    for _, models in usage.slices():
        assert sum(share.switch_s + share.step_s for share in models.values()) <= 0.5 + 1e-9


def test_only_the_last_slices_are_kept_however_long_a_turn_lasts():
    usage = DeviceUsage(slice_s=1.0, num_slices=3)
    usage.add("a", began_s=0.0, switched_s=1e6, ended_s=1e6 + 2.5, num_steps=1)
    assert [number for number, _ in usage.slices()] == [1_000_000, 1_000_001, 1_000_002]
    assert [number for number, _ in usage.slices(since=1_000_002)] == [1_000_002]
    assert usage.totals()["a"].switch_s == 1e6


class SlowEngine:
    """Each step takes half a second."""

    def __init__(self, name: str, work: int, clock: ManualClock) -> None:
        self.name, self.work, self.clock = name, work, clock

    def poll(self) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad(num_running=min(self.work, 1), num_waiting=0)

    def requests(self) -> list[EngineRequest]:
        return []

    def has_work(self) -> bool:
        return self.work > 0

    def run_step(self) -> bool:
        self.clock.advance(0.5)
        self.work -= 1
        return True

    def fail(self, error: BaseException) -> None: ...


class SlowSwitches:
    """A switch takes two seconds; the first one fails after one."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock, self.current, self.fails = clock, "", True

    def is_resident(self, name: str) -> bool:
        return name == self.current

    def missing_bytes(self, name: str) -> int:
        return 0 if name == self.current else 1

    def activate(self, name: str, evict_first: object = ()) -> None:
        if self.fails:
            self.fails = False
            self.clock.advance(1.0)
            raise AegaeonError("no room")
        if name != self.current:
            self.clock.advance(2.0)
        self.current = name

    def prefetch(self, name: str) -> bool:
        return False

    def weights_bytes(self, name: str) -> int:
        return 1000

    def let_go(self, name: str) -> None:
        pass


def test_the_step_loop_tells_where_the_time_of_the_device_went():
    clock = ManualClock()
    loop = StepLoop(policy=RoundRobin(2), residency=SlowSwitches(clock), clock=clock)
    for name, work in (("a", 3), ("b", 1)):
        loop.add(SlowEngine(name, work, clock))
    loop.run_until_idle()
    usage = loop.usage.totals()
    assert (usage["a"].steps, usage["a"].step_s) == (3, 1.5)
    assert (usage["b"].steps, usage["b"].step_s, usage["b"].turns) == (1, 0.5, 1)
    # b, whose turn came after the failed one of a, and a: one switch each beside the failed one.
    assert usage["a"].switch_s + usage["b"].switch_s == 5.0
    assert clock.now() == 7.0
    assert loop.counters.decisions >= loop.counters.turns == 4


def test_every_model_of_the_pool_has_series_from_the_start():
    clock = ManualClock()
    loop = StepLoop(policy=RoundRobin(2), residency=SlowSwitches(clock), clock=clock)
    registry = CollectorRegistry()
    registry.register(LoopCollector(loop, {"a": Meter(Slo()), "b": Meter(Slo())}))
    for name in ("a", "b"):
        turns = registry.get_sample_value("aegaeon_loop_turns_total", {"model_name": name})
        assert turns == 0
        met = {"model_name": name, "result": "met"}
        assert registry.get_sample_value("aegaeon_slo_requests_total", met) == 0
