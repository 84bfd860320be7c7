"""The step loop and round robin, on engines made of arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.core.clock import ManualClock
from aegaeon.core.config import Slo
from aegaeon.core.engine import EngineLoad, EngineRequest
from aegaeon.core.errors import AegaeonError
from aegaeon.sched.policies import POLICIES, make_policy
from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.sched.scheduler import ModelView, PoolState, Turn
from aegaeon.sched.step_loop import RETRY_DELAYS_S, StepLoop


@dataclass
class CountingEngine:
    """Has `work` steps to do; logs each in a journal shared with the others."""

    name: str
    work: int
    journal: list[str]
    raises_at: int | None = None
    arrivals: list[int] = field(default_factory=list)
    error: BaseException | None = None
    executes: bool = True
    poll_raises: bool = False
    to_report: bool = False  # a finished request that the next step only reports

    def poll(self) -> None:
        if self.poll_raises:
            raise AssertionError("the engine is in disorder")
        if self.arrivals:
            self.work += self.arrivals.pop(0)

    def load(self) -> EngineLoad:
        return EngineLoad(num_running=min(self.work, 1), num_waiting=0)

    def requests(self) -> list[EngineRequest]:
        done = 1 if self.work else 0
        return [EngineRequest("r", 1, done, True)] * done

    def has_work(self) -> bool:
        return self.work > 0 or self.to_report

    def run_step(self) -> bool:
        if self.work == 0:
            self.journal.append(f"{self.name} reports")
            self.to_report = False
            return False
        if self.raises_at is not None and self.work == self.raises_at:
            raise RuntimeError("the model broke")
        self.journal.append(self.name)
        if self.executes:
            self.work -= 1
        return self.executes

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.work = 0


@dataclass
class JournalResidency:
    journal: list[str]
    failures: dict[str, int] = field(default_factory=dict)
    current: str | None = None
    evict_first: tuple[str, ...] = ()

    def is_resident(self, name: str) -> bool:
        return name == self.current

    def missing_bytes(self, name: str) -> int:
        return 0 if name == self.current else 1000

    def activate(self, name: str, evict_first: Sequence[str] = ()) -> None:
        self.evict_first = tuple(evict_first)
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise AegaeonError("no room")
        if self.current != name:
            self.journal.append(f"switch to {name}")
        self.current = name

    def prefetch(self, name: str) -> bool:
        self.journal.append(f"prefetch {name}")
        return name != "no room"

    def weights_bytes(self, name: str) -> int:
        return 1000

    def let_go(self, name: str) -> None:
        self.journal.append(f"let go {name}")
        if self.failures.get(name, 0) > 0:
            self.failures[name] -= 1
            raise AegaeonError("not now")
        self.current = None


def make_loop(quantum: int, *engines: CountingEngine, failures: dict[str, int] | None = None):
    journal = engines[0].journal
    residency = JournalResidency(journal, failures or {})
    clock = ManualClock()
    loop = StepLoop(policy=RoundRobin(quantum), residency=residency, clock=clock)
    for engine in engines:
        loop.add(engine)
    return loop, clock


def test_models_alternate_after_quantum_steps():
    journal: list[str] = []
    loop, _ = make_loop(2, CountingEngine("a", 3, journal), CountingEngine("b", 3, journal))
    loop.run_until_idle()
    assert journal == [
        *("switch to a", "a", "a"),
        *("switch to b", "b", "b"),
        *("switch to a", "a"),
        *("switch to b", "b"),
    ]


def test_a_model_alone_with_work_is_never_switched_away():
    journal: list[str] = []
    loop, _ = make_loop(2, CountingEngine("a", 5, journal), CountingEngine("b", 0, journal))
    loop.run_until_idle()
    assert journal == ["switch to a", *"aaaaa"]
    assert loop.counters.steps == 5


def test_work_that_arrives_during_a_turn_is_taken_in():
    journal: list[str] = []
    loop, _ = make_loop(8, CountingEngine("a", 1, journal, arrivals=[0, 2, 1]))
    loop.run_turn()
    assert journal.count("a") == 4


def test_an_engine_that_raises_ends_alone():
    journal: list[str] = []
    broken = CountingEngine("a", 3, journal, raises_at=2)
    sound = CountingEngine("b", 3, journal)
    loop, _ = make_loop(2, broken, sound)
    loop.run_until_idle()
    assert isinstance(broken.error, RuntimeError)
    assert sound.error is None
    assert journal.count("b") == 3
    assert [engine.name for engine in loop.engines] == ["b"]
    assert loop.counters.failed_models == 1


def test_a_model_that_is_given_up_is_reported_with_its_error():
    journal: list[str] = []
    broken = CountingEngine("a", 3, journal, raises_at=2)
    loop, _ = make_loop(2, broken, CountingEngine("b", 3, journal))
    reported: list[tuple[str, str]] = []
    loop.on_failure = lambda name, error: reported.append((name, str(error)))
    loop.run_until_idle()
    assert reported == [("a", "the model broke")]


def test_an_engine_whose_poll_raises_ends_alone():
    journal: list[str] = []
    broken = CountingEngine("a", 3, journal, poll_raises=True)
    loop, _ = make_loop(2, broken, CountingEngine("b", 3, journal))
    loop.run_until_idle()
    assert isinstance(broken.error, AssertionError)
    assert journal.count("b") == 3


def test_an_unexpected_error_of_a_switch_ends_its_model_alone():
    journal: list[str] = []
    odd = CountingEngine("a", 1, journal)
    loop, _ = make_loop(1, odd, CountingEngine("b", 2, journal))
    activate = loop.residency.activate

    def activate_or_raise(name: str, evict_first: Sequence[str] = ()) -> None:
        if name == "a":
            raise ValueError("blocks outside the cache")
        activate(name, evict_first)

    loop.residency.activate = activate_or_raise
    loop.run_until_idle()
    assert isinstance(odd.error, ValueError)
    assert journal.count("b") == 2


def test_the_report_of_a_finished_request_is_no_reason_to_switch():
    journal: list[str] = []
    engines = CountingEngine("a", 2, journal), CountingEngine("b", 0, journal, to_report=True)
    loop, _ = make_loop(8, *engines)
    loop.run_until_idle()
    assert journal == ["b reports", "switch to a", "a", "a"]
    assert (loop.counters.flushes, loop.counters.turns) == (1, 1)


def test_a_failed_switch_is_tried_again_later_and_others_go_on():
    journal: list[str] = []
    loop, clock = make_loop(
        1, CountingEngine("a", 1, journal), CountingEngine("b", 2, journal), failures={"a": 1}
    )
    assert loop.run_turn()  # a fails
    assert [loop.run_turn(), loop.run_turn()] == [True, True]  # b twice, without a
    assert not loop.run_turn()  # a still waits
    clock.advance(RETRY_DELAYS_S[0])
    assert loop.run_turn()
    assert journal == ["switch to b", "b", "b", "switch to a", "a"]
    assert loop.counters.failed_switches == 1


def test_a_model_whose_switch_keeps_failing_is_given_up():
    journal: list[str] = []
    engine = CountingEngine("a", 1, journal)
    loop, clock = make_loop(1, engine, failures={"a": 1000})
    for delay in (*RETRY_DELAYS_S, 0.0):
        assert loop.run_turn()
        assert engine.error is None or delay == 0.0
        clock.advance(delay)
    assert isinstance(engine.error, AegaeonError)
    assert not loop.run_turn()


def test_a_step_that_ran_nothing_yields_to_the_others():
    journal: list[str] = []
    stuck = CountingEngine("a", 1, journal, executes=False)
    loop, _ = make_loop(8, stuck, CountingEngine("b", 1, journal))
    loop.run_turn()
    loop.run_turn()
    assert journal == ["switch to a", "a", "switch to b", "b"]


def test_a_turn_ends_with_its_quota_of_time():
    journal: list[str] = []
    engine = CountingEngine("a", 9, journal)
    loop, clock = make_loop(8, engine)

    @dataclass
    class Quotas:
        quota_s: float

        def next_turn(self, state: PoolState, now: float) -> Turn:
            return Turn("a", quota_s=self.quota_s)

    step = engine.run_step

    def run_step() -> bool:
        clock.advance(0.1)
        return step()

    engine.run_step = run_step
    loop.policy = Quotas(0.25)
    loop.run_turn()
    assert journal.count("a") == 3
    loop.policy = Quotas(0.0)
    loop.run_turn()
    assert journal.count("a") == 4


@pytest.mark.parametrize("policy", ["slack", "paper", "request-level", "fcfs"])
def test_every_policy_ends_all_work_of_the_loop(policy):
    journal: list[str] = []
    engines = [CountingEngine(name, 20, journal) for name in "abc"]
    loop, clock = make_loop(1, *engines)
    loop.policy = make_policy(policy, quantum=2)
    for engine in engines:

        def run_step(step=engine.run_step) -> bool:
            clock.advance(0.01)
            return step()

        engine.run_step = run_step
    loop.run_until_idle()
    assert [journal.count(name) for name in "abc"] == [20, 20, 20]
    assert loop.costs.step_s("a", 1) == pytest.approx(0.01, rel=0.05)


def test_two_engines_of_one_name_are_refused():
    loop, _ = make_loop(1, CountingEngine("a", 1, []))
    with pytest.raises(ValueError, match="already hosted"):
        loop.add(CountingEngine("a", 1, []))


def test_stop_ends_a_turn_after_the_current_step():
    journal: list[str] = []
    loop, _ = make_loop(100, CountingEngine("a", 100, journal))
    loop.stop()
    loop.run_turn()
    assert journal == ["switch to a", "a"]


@settings(deadline=None)  # a busy machine proves nothing about the order of steps
@given(
    work=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    quantum=st.integers(1, 9),
)
def test_all_work_is_done_and_nobody_waits_longer_than_the_bound(work, quantum):
    journal: list[str] = []
    engines = [CountingEngine(f"m{i}", steps, journal) for i, steps in enumerate(work)]
    loop, _ = make_loop(quantum, *engines)
    loop.run_until_idle()
    steps = [entry for entry in journal if not entry.startswith("switch")]
    assert [steps.count(f"m{i}") for i in range(len(work))] == work
    for i, total in enumerate(work):
        positions = [-1] + [at for at, name in enumerate(steps) if name == f"m{i}"]
        gaps = [after - before - 1 for before, after in pairwise(positions)]
        assert all(gap <= (len(work) - 1) * quantum for gap in gaps), (i, total)


def view(name: str, *, has_work: bool = True, blocked_until: float = 0.0) -> ModelView:
    return ModelView(
        name, num_running=1, num_waiting=0, has_work=has_work, resident=False,
        blocked_until=blocked_until,
    )  # fmt: skip


def test_round_robin_starts_after_the_last_and_skips_what_cannot_run():
    state = PoolState(
        models=(view("a"), view("b"), view("c", has_work=False), view("d", blocked_until=9.0)),
        last="b",
    )
    assert RoundRobin(3).next_turn(state, now=5.0) == Turn("a", max_steps=3)
    assert RoundRobin(3).next_turn(state, now=9.0) == Turn("d", max_steps=3)


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="round-robin"):
        make_policy("fastest", quantum=1)


def test_a_quantum_below_one_step_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        RoundRobin(0)


def test_the_pool_file_accepts_the_policies_that_serve_every_model():
    from aegaeon.core import config

    assert set(config.POLICIES) == set(POLICIES) - {"static"}


def test_what_a_turn_asks_for_is_brought_in_after_the_switch_and_before_the_steps():
    class Ahead:
        def next_turn(self, state: PoolState, now: float) -> Turn | None:
            return Turn("a", max_steps=1, prefetch=("b", "no room", "c"))

    journal: list[str] = []
    loop, _ = make_loop(1, CountingEngine("a", 2, journal))
    loop.policy = Ahead()
    assert loop.run_turn()
    assert journal == ["switch to a", "prefetch b", "prefetch no room", "a"]


def test_a_call_is_made_between_two_steps_and_cuts_the_turn_short():
    journal: list[str] = []
    engine = CountingEngine("a", 4, journal)
    loop, _ = make_loop(8, engine)
    step = engine.run_step

    def step_and_call() -> bool:
        if journal.count("a") == 1:
            loop.between_steps(lambda: journal.append("call"))
        return step()

    engine.run_step = step_and_call  # type: ignore[method-assign]
    loop.run_until_idle()
    assert journal == ["switch to a", "a", "a", "call", "a", "a"]


def test_what_a_call_raises_is_its_callers():
    journal: list[str] = []
    loop, _ = make_loop(8, CountingEngine("a", 2, journal))
    failed = loop.between_steps(lambda: 1 // 0)
    loop.run_until_idle()
    assert isinstance(failed.exception(), ZeroDivisionError)
    assert journal.count("a") == 2


def test_a_call_that_comes_after_the_stop_is_cancelled():
    loop, _ = make_loop(8, CountingEngine("a", 1, []))
    loop.stop()
    late = loop.between_steps(lambda: 1)
    loop.run()
    assert late.cancelled()


def test_the_victims_that_a_turn_names_are_handed_to_the_residency():
    class Names:
        def next_turn(self, state: PoolState, now: float) -> Turn | None:
            return Turn("a", max_steps=1, evict_first=("c", "b"))

    loop, _ = make_loop(1, CountingEngine("a", 2, []))
    loop.policy = Names()
    assert loop.run_turn()
    assert loop.residency.evict_first == ("c", "b")


@dataclass
class PromptEngine:
    """Prompts take `chunk` tokens a step and 1 ms each; a step after that 10 ms for all."""

    clock: ManualClock
    prompts: list[int]
    tokens: int = 3
    chunk: int = 1000
    name: str = "a"

    def __post_init__(self) -> None:
        self.open = [[size, 0, 0] for size in self.prompts]  # prompt, computed, tokens

    def poll(self) -> None: ...

    def load(self) -> EngineLoad:
        # As vLLM counts: what has been scheduled once is running, its prompt computed or not.
        running = sum(computed > 0 for _, computed, _ in self.open)
        return EngineLoad(running, len(self.open) - running)

    def requests(self) -> list[EngineRequest]:
        return [
            EngineRequest(f"{i}", size, tokens, tokens > 0, ttft_ms=500.0 if i else None)
            for i, (size, _, tokens) in enumerate(self.open)
        ]

    def has_work(self) -> bool:
        return bool(self.open)

    def run_step(self) -> bool:
        left = self.chunk
        for each in self.open:
            size, computed, tokens = each
            take = min(left, size - computed)
            left -= take
            each[1] += take
            self.clock.advance(take * 1e-3)
            if each[1] == size:
                each[2] = tokens + 1
        self.clock.advance(0.01)
        self.open = [each for each in self.open if each[2] < self.tokens]
        return True

    def fail(self, error: BaseException) -> None:
        raise error


def loop_with_prompts(*prompts: int, chunk: int = 1000) -> StepLoop:
    clock = ManualClock()
    loop = StepLoop(policy=RoundRobin(100), residency=JournalResidency([]), clock=clock)
    loop.add(PromptEngine(clock, list(prompts), chunk=chunk), slo=Slo(ttft_ms=2000.0, tpot_ms=50.0))
    return loop


def test_what_prompts_take_is_learned_apart_from_the_steps_after_them():
    """Ten turns, each of two prompts in one step."""
    loop = loop_with_prompts()
    (engine,) = loop.engines
    for size in (100, 200, 300, 400) * 10:
        engine.open = [[size, 0, 0], [size, 0, 0]]
        loop.run_until_idle()
    assert loop.costs.prefill_s("a", 500) == pytest.approx(0.51, rel=0.02)
    assert loop.costs.step_s("a", 2) == pytest.approx(0.01, rel=0.02)


def test_a_prompt_in_pieces_is_neither_taken_for_a_step_nor_for_a_whole_prompt():
    loop = loop_with_prompts(2500)
    (engine,) = loop.engines
    prefill_s = loop.costs.prefill_s("a", 500)
    for _ in range(10):
        engine.open = [[2500, 0, 0]]
        loop.run_until_idle()
    assert loop.costs.prefill_s("a", 500) == prefill_s
    assert loop.costs.step_s("a", 1) == pytest.approx(0.01, rel=0.1)


def test_a_request_is_due_by_its_own_slo_and_else_by_its_models():
    states: list[PoolState] = []
    loop = loop_with_prompts(10, 10)
    one_by_one = RoundRobin(1)

    class Watching:
        def next_turn(self, state: PoolState, now: float) -> Turn | None:
            states.append(state)
            return one_by_one.next_turn(state, now)

    loop.policy = Watching()
    loop.run_turn()
    assert states[0].models[0].work.first_due_s == 0.5  # the second one's
    (engine,) = loop.engines
    engine.open = [[10, 0, 0]]
    loop.run_turn()
    arrived_s = states[1].models[0].work.oldest_arrival_s
    assert states[1].models[0].work.first_due_s == pytest.approx(arrived_s + 2.0)
    assert loop.seen is not None
    assert loop.seen[0] is states[-1]


def test_what_is_removed_is_not_run_and_its_name_is_free():
    journal: list[str] = []
    loop = StepLoop(RoundRobin(1), JournalResidency(journal), ManualClock())
    engines = [CountingEngine(name, 2, journal) for name in "ab"]
    for engine in engines:
        loop.add(engine)
    loop.run_turn()
    assert loop.remove("a") is engines[0]
    loop.run_until_idle()
    assert journal == ["switch to a", "a", "switch to b", "b", "b"]
    assert set(loop.loads()) == {"b"}
    with pytest.raises(KeyError):
        loop.remove("a")
    loop.add(CountingEngine("a", 1, journal))
    loop.run_until_idle()
    assert journal[-2:] == ["switch to a", "a"]


def test_the_loop_says_how_long_nothing_has_come_of_its_work():
    journal: list[str] = []
    engine = CountingEngine("a", 1, journal)
    loop, clock = make_loop(1, engine)
    loop.run_turn()
    assert loop.progress.stuck_s() == 0.0
    engine.work, engine.executes = 5, False
    for _ in range(3):
        clock.advance(1.0)
        loop.run_turn()
    assert loop.progress.stuck_s() == 3.0
    assert loop.progress.doing == "a step of a"
    engine.executes = True
    clock.advance(1.0)
    loop.run_turn()
    assert loop.progress.stuck_s() == 0.0


def test_a_loop_without_work_is_not_stuck():
    loop, clock = make_loop(1, CountingEngine("a", 0, []))
    for _ in range(3):
        clock.advance(100.0)
        assert not loop.run_turn()
    assert loop.progress.stuck_s() == 0.0


def test_switches_that_fail_are_no_progress():
    loop, clock = make_loop(1, CountingEngine("a", 1, []), failures={"a": 3})
    for _ in range(3):
        loop.run_turn()
        clock.advance(7.0)
    assert loop.progress.stuck_s() == 21.0
    assert loop.progress.doing == "switching to a"
    loop.run_turn()
    assert loop.progress.stuck_s() == 0.0


def test_what_the_caller_raises_about_a_failed_model_ends_the_loop():
    told: list[str] = []

    def lost(model: str, error: BaseException) -> None:
        told.append(model)
        raise AegaeonError("the device is lost") from error

    engine = CountingEngine("a", 3, [], raises_at=2)
    loop, _ = make_loop(1, engine)
    loop.on_failure = lost
    with pytest.raises(AegaeonError, match="device is lost"):
        loop.run()
    assert told == ["a"]
    assert engine.error is not None


def test_other_objectives_hold_for_open_requests_too():
    engine = CountingEngine("a", 5, [])
    loop, _ = make_loop(1, engine)
    loop.run_turn()
    loop.configure("a", slo=Slo(ttft_ms=1000.0, tpot_ms=1.0), priority=4)
    loop.run_turn()
    assert loop.seen is not None
    assert loop.seen[0].models[0].work.priority == 4
    loop.configure("gone", slo=Slo(), priority=0)


def test_an_idle_model_leaves_when_its_time_is_over_and_a_refusal_is_no_failure():
    engine = CountingEngine("a", 1, [])
    loop, clock = make_loop(1, engine)
    loop.keep_alive.limits_s["a"] = 10.0
    loop.run_turn()
    loop.run_turn()  # from now on it is idle
    loop.residency.failures["a"] = 1
    for _ in range(20):
        clock.advance(1.5)
        loop.run_turn()
    assert engine.journal == ["switch to a", "a", "let go a", "let go a"]
    assert loop.counters.failed_models == 0


def test_a_request_has_waited_since_it_came_to_the_server_and_not_since_it_was_first_polled():
    class Late(CountingEngine):
        def requests(self) -> list[EngineRequest]:
            return [EngineRequest("r", 1, 0, True, age_s=3.0)]

    loop, clock = make_loop(1, Late("a", 5, []))
    clock.advance(100.0)
    loop.run_turn()
    loop.run_turn()
    state, _ = loop.seen
    assert state.models[0].work.oldest_arrival_s == 97.0
    assert state.models[0].weights_bytes == 1000
