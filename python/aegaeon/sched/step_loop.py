"""The loop of an instance: take in requests, ask the policy, activate a model, step it.

Replaces the busy loop that each vLLM engine core would run for itself. Knows engines, a policy
and a residency by their Protocols only, so the tests drive it with arithmetic and a manual clock.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from aegaeon.core.clock import Clock
from aegaeon.core.config import Slo
from aegaeon.core.engine import Engine, EngineLoad, Residency
from aegaeon.core.errors import AegaeonError
from aegaeon.sched.cost import CostModel
from aegaeon.sched.keep_alive import KeepAlive
from aegaeon.sched.open_requests import OpenRequests
from aegaeon.sched.progress import Progress
from aegaeon.sched.scheduler import NO_WORK, ModelView, Policy, PoolState, RequestView, Turn, Work
from aegaeon.sched.usage import DeviceUsage

logger = logging.getLogger(__name__)

# After a failed switch a model waits, twice as long each time, and is given up after the last.
RETRY_DELAYS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
# A step that ran no model although there is work (all blocks taken, a remote transfer pending).
EMPTY_STEP_DELAY_S = 0.001
# What the loop is said to do while it carries out a call of `between_steps`.
ORDER = "carrying out an order"


@dataclass
class LoopCounters:
    """What the loop did so far; read from other threads without a lock (each field is one int).

    decisions: times that the policy was asked; turns: that it named a model.
    flushes: steps that only reported finished requests, for which no model was switched.
    """

    decisions: int = 0
    turns: int = 0
    steps: int = 0
    flushes: int = 0
    failed_switches: int = 0
    failed_models: int = 0


@dataclass
class _Entry:
    engine: Engine
    slo: Slo
    priority: int
    blocked_until: float = 0.0
    failures: int = 0
    last_run_s: float | None = None
    # When each open request came, and their sum as of the load it was made for.
    arrived_s: dict[str, float] = field(default_factory=dict)
    summed: EngineLoad | None = None
    work: Work = NO_WORK


@dataclass
class StepLoop:
    """Alternates between engines at step granularity.

    policy: decides; asked once per turn.
    residency: `activate` is called before the steps of a turn.
    clock: for back-off and quotas.
    wake: set it (from any thread) when an engine may have got something to poll.
    costs: learns from every step and switch what they take.
    usage: what each turn took of the device.
    recoverable: exceptions of `activate` after which everything is as before and a retry helps.
    seen: the state that the policy was asked with last, and when. Readable from any thread.
    on_failure: called after a model was taken out of service; what it raises ends `run`.
    progress: whether the loop gets on. Readable from any thread.
    keep_alive: which idle models leave the device.
    """

    policy: Policy
    residency: Residency
    clock: Clock
    wake: threading.Event = field(default_factory=threading.Event)
    recoverable: tuple[type[BaseException], ...] = (AegaeonError,)
    counters: LoopCounters = field(default_factory=LoopCounters)
    costs: CostModel = field(default_factory=CostModel)
    usage: DeviceUsage = field(default_factory=DeviceUsage)
    seen: tuple[PoolState, float] | None = None
    on_failure: Callable[[str, BaseException], None] | None = None
    keep_alive: KeepAlive = field(default_factory=KeepAlive)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(self.clock)
        self._entries: dict[str, _Entry] = {}
        self._last: str | None = None
        self._stop = False
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def add(self, engine: Engine, *, slo: Slo | None = None, priority: int = 0) -> None:
        """Host one more engine; `priority` is added to that of its requests.

        Only from the loop's thread, or while it is not running.
        """
        if engine.name in self._entries:
            raise ValueError(f"an engine named {engine.name!r} is already hosted")
        self._entries[engine.name] = _Entry(engine, slo or Slo(), priority)

    def remove(self, name: str) -> Engine:
        """Host the engine `name` no longer; its open requests are the caller's to end.

        Only from the loop's thread, or while it is not running. Raises KeyError for a name that is
        not hosted, or has been given up.
        """
        entry = self._entries.pop(name)
        self.costs.forget(name)
        if self._last == name:
            self._last = None
        return entry.engine

    def configure(self, name: str, *, slo: Slo, priority: int) -> None:
        """Change what is added to and asked of an engine's requests, the open ones included.

        Only from the loop's thread, or while it is not running.
        """
        entry = self._entries.get(name)
        if entry is not None:  # else it is out of service
            entry.slo, entry.priority, entry.summed = slo, priority, None

    @property
    def engines(self) -> Iterable[Engine]:
        return (entry.engine for entry in self._entries.values())

    def loads(self) -> dict[str, EngineLoad]:
        """Open requests of every engine in service. Callable from any thread."""
        return {name: entry.engine.load() for name, entry in list(self._entries.items())}

    def between_steps(self, function: Callable[[], Any]) -> Future[Any]:
        """Have the loop's thread call `function` between two steps. Callable from any thread.

        The future takes its result or its exception; it is cancelled if the loop stops before.
        """
        future: Future[Any] = Future()
        self._calls.append((function, future))
        self.wake.set()
        return future

    def stop(self) -> None:
        """Make `run` return after the current step. Callable from any thread."""
        self._stop = True
        self.wake.set()

    def run(self) -> None:
        """Loop until `stop`; sleeps while no engine has work."""
        while not self._stop:
            # Cleared before polling: what arrives after the poll sets it again.
            self.wake.clear()
            if not self.run_turn():
                self.wake.wait(timeout=self._idle_s())
        while self._calls:
            self._calls.popleft()[1].cancel()

    def run_until_idle(self) -> None:
        """Loop until no engine has work; for offline generation."""
        while not self._stop and any(entry.engine.has_work() for entry in self._entries.values()):
            if not self.run_turn():
                self.wake.wait(timeout=self._idle_s())

    def run_turn(self) -> bool:
        """One turn of one model. Returns False when no model could run."""
        self._make_calls()
        self.progress.begin("taking in requests")
        self._poll()
        state, now = self._state(), self.clock.now()
        self.seen = state, now
        self._let_idle_go(state, now)
        self.counters.decisions += 1
        turn = self.policy.next_turn(state, now)
        if turn is None:
            if not any(model.has_work for model in state.models):
                self.progress.rest()
            return False
        entry = self._entries[turn.model]
        self._last = turn.model
        self.counters.turns += 1
        began_s, steps_before = self.clock.now(), self.counters.steps
        switched_s = None
        try:
            if self._activate(entry, turn):
                switched_s = self.clock.now()
                self._bring_in_ahead(turn)
                self._run_steps(entry, turn)
        except Exception as error:
            self._give_up(entry, error)
        ended_s = self.clock.now()
        self.usage.add(
            turn.model,
            began_s=began_s,
            switched_s=ended_s if switched_s is None else switched_s,
            ended_s=ended_s,
            num_steps=self.counters.steps - steps_before,
        )
        return True

    def is_busy(self, name: str) -> bool:
        """Whether `name` has open requests."""
        entry = self._entries.get(name)
        return entry is not None and entry.engine.load().num_unfinished > 0

    def _make_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            self.progress.begin(ORDER)
            try:
                result = function()
            except Exception as error:
                future.set_exception(error)  # it is the caller's; the loop has no part in it
            else:
                future.set_result(result)
            self.progress.made()

    def _poll(self) -> None:
        for entry in list(self._entries.values()):
            try:
                engine = entry.engine
                engine.poll()
                load = engine.load()
                if load.num_unfinished == 0 and engine.has_work():
                    # The report of a finished request runs no model: no switch for it.
                    engine.run_step()
                    self.counters.flushes += 1
                    load = engine.load()
                if entry.summed != load:
                    self._sum_up(entry, load)
            except Exception as error:
                self._give_up(entry, error)

    def _state(self) -> PoolState:
        models = []
        for name, entry in self._entries.items():
            load = entry.engine.load()
            models.append(
                ModelView(
                    name=name,
                    num_running=load.num_running,
                    num_waiting=load.num_waiting,
                    has_work=load.num_unfinished > 0,
                    resident=self.residency.is_resident(name),
                    blocked_until=entry.blocked_until,
                    work=entry.work,
                    weights_bytes=self.residency.weights_bytes(name),
                    missing_bytes=self.residency.missing_bytes(name),
                    last_run_s=entry.last_run_s,
                )
            )
        return PoolState(models=tuple(models), last=self._last, costs=self.costs)

    def _let_idle_go(self, state: PoolState, now: float) -> None:
        for name in self.keep_alive.overdue(state, now):
            try:
                self.residency.let_go(name)
            except self.recoverable as error:
                # It is as it was, and somebody who needs the room will try again.
                logger.warning("the idle model %s stays on the device: %s", name, error)

    def _sum_up(self, entry: _Entry, load: EngineLoad) -> None:
        """The work of a model anew: it has run, or its counts have changed."""
        now, before = self.clock.now(), entry.arrived_s
        entry.arrived_s = {}
        requests = OpenRequests()
        for each in entry.engine.requests():
            entry.arrived_s[each.id] = before.get(each.id, now - each.age_s)
            requests.add(
                RequestView(
                    id=each.id,
                    arrival_s=entry.arrived_s[each.id],
                    prompt_tokens=each.prompt_tokens,
                    tokens_done=each.tokens_done,
                    prefilled=each.prefilled,
                    ttft_s=(each.ttft_ms or entry.slo.ttft_ms) / 1e3,
                    tpot_s=(each.tpot_ms or entry.slo.tpot_ms) / 1e3,
                    priority=entry.priority + each.priority,
                )
            )
        entry.work, entry.summed = requests.work, load

    def _activate(self, entry: _Entry, turn: Turn) -> bool:
        missing_bytes = self.residency.missing_bytes(entry.engine.name)
        started_s = self.clock.now()
        self.progress.begin(f"switching to {entry.engine.name}")
        try:
            self.residency.activate(entry.engine.name, turn.evict_first)
        except self.recoverable as error:
            self.counters.failed_switches += 1
            if entry.failures == len(RETRY_DELAYS_S):
                self._give_up(entry, error)
                return False
            delay = RETRY_DELAYS_S[entry.failures]
            entry.failures += 1
            entry.blocked_until = self.clock.now() + delay
            # Going on is correct: activate left every byte on the device or on the host.
            logger.warning(
                "switch to %s failed, next try in %.2f s: %s", entry.engine.name, delay, error
            )
            return False
        entry.failures = 0
        now = self.clock.now()
        if missing_bytes:
            self.progress.made(now)
        self.costs.observe_switch(missing_bytes, now - started_s)
        return True

    def _bring_in_ahead(self, turn: Turn) -> None:
        """The most urgent first; what has no room leaves none for the less urgent."""
        for name in turn.prefetch:
            if not self.residency.prefetch(name):
                return

    def _run_steps(self, entry: _Entry, turn: Turn) -> None:
        name, load = entry.engine.name, entry.engine.load()
        # A switch for want of host memory may have changed what is to be computed.
        known = entry.summed == load
        prompt_tokens = entry.work.prefill_tokens if known and load.num_running == 0 else 0
        decoding = known and entry.work.prefill_tokens == 0
        entry.summed = None  # it runs: its sum is made anew for the next decision
        began_s = self.clock.now()
        ends_s = began_s + turn.quota_s
        self.progress.begin(f"a step of {name}")
        for _ in range(turn.max_steps):
            executed = entry.engine.run_step()
            self.counters.steps += 1
            if not executed and entry.engine.has_work():
                entry.blocked_until = self.clock.now() + EMPTY_STEP_DELAY_S
                return
            entry.last_run_s = self.clock.now()
            self.progress.made(entry.last_run_s)
            step_s = entry.last_run_s - began_s
            if decoding:
                self.costs.observe_step(name, load.num_running, step_s)
            else:
                decoding = all(request.prefilled for request in entry.engine.requests())
                if prompt_tokens and decoding:  # all prompts, and nothing else, in one step
                    self.costs.observe_prefill(name, prompt_tokens, step_s)
            prompt_tokens = 0
            if self._stop or self._calls or entry.last_run_s >= ends_s:
                return
            entry.engine.poll()
            began_s, load = self.clock.now(), entry.engine.load()
            if load.num_unfinished == 0:
                return
            decoding = decoding and load.num_waiting == 0

    def _give_up(self, entry: _Entry, error: BaseException) -> None:
        """What one model's engine raises ends that model only."""
        logger.error("model %s is out of service", entry.engine.name, exc_info=error)
        self.counters.failed_models += 1
        del self._entries[entry.engine.name]
        entry.engine.fail(error)
        if self.on_failure is not None:
            self.on_failure(entry.engine.name, error)

    def _idle_s(self) -> float:
        """Until the next blocked model with work may run; a second when there is none."""
        now = self.clock.now()
        waits = [
            entry.blocked_until - now for entry in self._entries.values() if entry.engine.has_work()
        ]
        return max(0.0, min([1.0, *waits]))
