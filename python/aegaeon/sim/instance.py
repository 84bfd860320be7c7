"""One simulated instance: obeys the turns of a policy as the live step loop does.

Decides, switches, steps, decides again. Between two things that change a batch (a request that
ends, one that joins, the end of a turn) all steps are alike, so they are one event. What a turn may
do, and when it ends, is that of `sched.step_loop` and `sched.scheduler.Turn`; a test runs both on
the same requests.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappush

from aegaeon.core.slo import TokenRun
from aegaeon.sched.cost import CostModel
from aegaeon.sched.scheduler import (
    UNLIMITED_STEPS,
    Arrival,
    ModelView,
    Phase,
    Policy,
    PoolState,
    RequestView,
    Turn,
)
from aegaeon.sched.step_loop import EMPTY_STEP_DELAY_S
from aegaeon.sim.account import InstanceTotals, Span
from aegaeon.sim.hardware import GpuGroup, Model, profile_of
from aegaeon.sim.memory import DeviceMemory, Held
from aegaeon.sim.queues import ModelQueue, SimRequest

# Prompt tokens that one mixed step takes, whole prompts only (the first one always).
STEP_TOKENS = 8192
# Two sums of the same seconds may differ in the last bits.
_EPSILON_S = 1e-9

NEVER_S = math.inf


class Activity(enum.Enum):
    IDLE = enum.auto()
    SWITCHING = enum.auto()
    STEPPING = enum.auto()


class Hosted:
    """One model on one instance."""

    __slots__ = ("blocked_until", "held", "last_run_s", "model", "parked", "place", "queue", "view")

    def __init__(self, place: int, model: Model, memory: DeviceMemory) -> None:
        self.place = place
        self.model = model
        self.queue = ModelQueue(model)
        self.held: Held = memory.add(model, lambda: self.queue.context_tokens)
        # Prefilled elsewhere, and without room here so far.
        self.parked: deque[SimRequest] = deque()
        self.blocked_until = 0.0
        self.last_run_s: float | None = None
        self.view: ModelView | None = None


@dataclass(slots=True)
class _Segment:
    """Equal steps under way. `prompts` are computed in the (then only) step."""

    start_s: float
    gap_s: float
    steps: int
    prompts: list[SimRequest]
    prefill_s: float
    decodes: bool


class Instance:
    """role: what its policy is asked for; on a PREFILL instance requests leave after their prompt.

    on_end(request, runs, now): it has all its tokens. on_prefilled(instance, request, now).
    on_closed(instance, now): a model has no open request here any more; may bring others.
    next_s: when `happen` is to be called; never while idle. Each time it changes, the time and the
    instance's number are pushed to the heap `agenda`.
    shortest_s: turns of both phases last at least this long, whatever the policy says.
    spans: filled when given.
    """

    def __init__(
        self,
        number: int,
        group: GpuGroup,
        models: Sequence[Model],
        policy: Policy,
        *,
        agenda: list[tuple[float, int]],
        role: Phase = Phase.BOTH,
        on_end: Callable[[SimRequest, list[TokenRun], float], None],
        shows_all: bool = False,
        shortest_s: float = 0.0,
        spans: list[Span] | None = None,
    ) -> None:
        self.number = number
        self.group = group
        self.policy = policy
        self.role = role
        self.totals = InstanceTotals()
        self.next_s = NEVER_S
        self.costs = CostModel(
            profiles={model.name: profile_of(model, group.gpu) for model in models},
            link_bytes_per_s=group.link_bytes_per_s,
            switch_s0=group.switch_s,
        )
        self.memory = DeviceMemory(
            capacity_bytes=group.capacity_bytes,
            link_bytes_per_s=group.link_bytes_per_s,
            switch_s0=group.switch_s,
            prefetch=group.prefetch,
            is_busy=lambda name: self.hosted[name].queue.num_open > 0,
        )
        self.hosted: dict[str, Hosted] = {}
        for place, model in enumerate(models):
            self.hosted[model.name] = Hosted(place, model, self.memory)
        self.open: dict[str, Hosted] = {}
        self._on_end = on_end
        self.on_prefilled: Callable[[Instance, SimRequest, float], None] = _nobody_asked
        self.on_closed: Callable[[Instance, float], None] = _nobody_waits
        self._agenda = agenda
        self._shows_all = shows_all
        self._shortest_s = shortest_s
        self._spans = spans
        self._activity = Activity.IDLE
        self._arrived: list[Arrival] = []
        self._last: str | None = None
        self._turn = Turn("")
        self._current: Hosted | None = None
        self._quota_end_s = 0.0
        self._steps_done = 0
        self._turn_ends_at = self._turn_steps = 0
        self._quota_s = 0.0
        self._repeating = False
        self._segment: _Segment | None = None
        self._asked_s = self._began_s = 0.0
        self._joining: list[SimRequest] = []

    # -- requests come ---------------------------------------------------------------------

    def arrive(self, request: SimRequest, now: float) -> None:
        """Its prompt is to be computed here."""
        hosted = self._opened(request)
        hosted.queue.arrive(request)
        deadlines = hosted.model.deadlines
        self._arrived.append(
            Arrival(
                request.model,
                RequestView(
                    str(request.number),
                    request.arrival_s,
                    request.input_tokens,
                    ttft_s=deadlines.ttft_s,
                    tpot_s=deadlines.tpot_s,
                    priority=hosted.model.priority,
                ),
            )
        )
        if self._activity is Activity.IDLE:
            self._wake_at(now)  # not at once: others may come at the same time
        elif hosted is not self._current:
            self._stop_repeating(now)
        elif self._turn.phase is not Phase.DECODE and hosted.queue.has_room(
            hosted.queue.waiting[0]
        ):
            self._cut_segment(self._steps_under_way(now))

    def hand_over(self, request: SimRequest, now: float) -> None:
        """Its prompt was computed elsewhere, and its KV cache lies on the host."""
        hosted = self._opened(request)
        if not hosted.queue.has_room(request):
            hosted.parked.append(request)
            return
        hosted.queue.reserve(request)
        if self._activity is Activity.STEPPING and hosted is self._current:
            self._joining.append(request)
            self._cut_segment(self._steps_under_way(now))
            return
        self._start_decoding(hosted, request)
        if self._activity is Activity.IDLE:
            self._wake_at(now)

    def has_room(self, request: SimRequest) -> bool:
        hosted = self.hosted[request.model]
        return not hosted.parked and hosted.queue.has_room(request)

    def num_open(self, model: str) -> int:
        hosted = self.open.get(model)
        return 0 if hosted is None else hosted.queue.num_open + len(hosted.parked)

    def is_open(self, model: str) -> bool:
        return model in self.open

    def _opened(self, request: SimRequest) -> Hosted:
        hosted = self.hosted[request.model]
        self.open[request.model] = hosted
        hosted.view = None
        return hosted

    def _start_decoding(self, hosted: Hosted, request: SimRequest) -> None:
        hosted.queue.start_decoding(request)
        hosted.held.saved_tokens += request.input_tokens + 1
        hosted.view = None

    def _steps_under_way(self, now: float) -> int:
        """Steps of the segment that have begun by now."""
        segment = self._segment
        if segment is None:
            return 0
        return math.ceil((now - segment.start_s - _EPSILON_S) / segment.gap_s)

    def _cut_segment(self, steps: int) -> None:
        segment = self._segment
        if segment is not None and steps < segment.steps:
            segment.steps = max(1, steps)
            self._wake_at(segment.start_s + segment.steps * segment.gap_s)

    def _stop_repeating(self, now: float) -> None:
        """Another model has work: the turn under way ends where the policy wanted it to."""
        segment = self._segment
        if segment is None or not self._repeating:
            return
        self._repeating = False
        turn = min(self._turn_steps, self._steps_in(self._quota_s, segment.gap_s))
        done = self._steps_done + self._steps_under_way(now)
        self._turn_ends_at = max(1, -(-done // turn)) * turn
        self._quota_end_s = NEVER_S
        self._cut_segment(self._turn_ends_at - self._steps_done)

    # -- time passes -----------------------------------------------------------------------

    def happen(self) -> None:
        """What happens at `next_s`: a switch or a run of steps has ended, or a pause."""
        now, self.next_s = self.next_s, NEVER_S
        if self._activity is Activity.STEPPING:
            self._end_of_steps(now)
        elif self._activity is Activity.SWITCHING:
            self._end_of_switch(now)
        else:
            self._decide(now)

    def _wake_at(self, time_s: float) -> None:
        if time_s != self.next_s and time_s < NEVER_S:
            heappush(self._agenda, (time_s, self.number))
        self.next_s = time_s

    def _decide(self, now: float) -> None:
        self._activity, self.next_s = Activity.IDLE, NEVER_S
        if not self.open:
            return
        turn = self.policy.next_turn(self.state(now), now)
        self._arrived.clear()
        if turn is None:
            blocked = [h.blocked_until for h in self.open.values() if h.blocked_until > now]
            self._wake_at(min(blocked, default=NEVER_S))
            return
        self._turn, self._last, self._asked_s = turn, turn.model, now
        self._current = hosted = self.hosted[turn.model]
        self.totals.turns += 1
        switch = self.memory.activate(turn.model, turn.evict_first, now)
        self._began_s = now
        if switch is None:
            self._end_of_switch(now)
            return
        totals = self.totals
        totals.switches[switch.path] += 1
        totals.bytes_in += switch.bytes_in
        totals.bytes_out += switch.bytes_out
        totals.switch_s += switch.seconds
        if switch.path != "hot":
            self._forget_views()
            hosted.view = None
            if self._spans is not None:
                self._spans.append(
                    Span(self.number, turn.model, "switch", now, now + switch.seconds)
                )
        if switch.seconds:
            self._activity = Activity.SWITCHING
            self._wake_at(now + switch.seconds)
        else:
            self._end_of_switch(now)

    def _end_of_switch(self, now: float) -> None:
        for name in self._turn.prefetch:
            if not self.memory.prefetch(name, now):
                break
            self.totals.prefetches += 1
            self._forget_views()
            self.hosted[name].view = None
        turn = self._turn
        self._steps_done = 0
        self._quota_s, self._turn_ends_at = turn.quota_s, turn.max_steps
        if self._shortest_s and turn.phase is Phase.BOTH:
            self._lengthen()
        self._quota_end_s = now + self._quota_s
        self._turn_steps = self._turn_ends_at
        # Alone with work it would be chosen again and again: not asked until somebody comes. Turns
        # of one phase are left out, they depend on those before.
        self._repeating = len(self.open) == 1 and turn.phase is Phase.BOTH
        self._began_s = now
        self._begin_steps(now)

    def _lengthen(self) -> None:
        """The turn lasts at least `shortest_s`."""
        hosted = self._current
        assert hosted is not None
        self._quota_s = max(self._quota_s, self._shortest_s)
        if self._turn_ends_at < UNLIMITED_STEPS:
            batch = max(1, hosted.queue.num_decoding)
            step_s = self.costs.step_s(hosted.model.name, batch, hosted.queue.context_tokens)
            self._turn_ends_at = max(self._turn_ends_at, self._steps_in(self._shortest_s, step_s))

    def _begin_steps(self, now: float) -> None:
        hosted, turn = self._current, self._turn
        assert hosted is not None
        queue, name = hosted.queue, turn.model
        prompts: list[SimRequest] = []
        if queue.waiting and turn.phase is not Phase.DECODE:
            most = 1 if turn.phase is Phase.PREFILL else len(queue.waiting)
            # The engine looks for new requests after each step, not after a switch.
            known_s = now if self._steps_done else self._asked_s
            prompts = queue.take_prompts(
                max_requests=most, max_tokens=STEP_TOKENS, come_by_s=known_s
            )
        # A prompt for which the KV cache has no room makes its turn one for those that decode.
        batch = 0 if turn.phase is Phase.PREFILL and prompts else queue.num_decoding
        if not prompts and not batch:
            if not self._steps_done:
                hosted.blocked_until = now + EMPTY_STEP_DELAY_S
                hosted.view = None
            self._end_of_turn(now)
            return
        gap_s = self.costs.step_s(name, batch, queue.context_tokens) if batch else 0.0
        prefill_s, steps = 0.0, 1
        if prompts:
            tokens = sum(request.input_tokens for request in prompts)
            prefill_s = self.costs.prefill_s(name, tokens)
        else:
            steps = queue.steps_to_next_end
            if queue.waiting and not self._steps_done and turn.phase is not Phase.DECODE:
                steps = 1  # then those that came during the switch are known
            if not self._repeating:
                steps = min(steps, self._turn_ends_at - self._steps_done)
                if self._quota_end_s < NEVER_S:
                    steps = min(steps, self._steps_in(self._quota_end_s - now, gap_s))
            if steps > 1:  # the context grows with each step: all get their mean
                grown = queue.context_tokens + batch * (steps - 1) // 2
                gap_s = self.costs.step_s(name, batch, grown)
        step_s = gap_s + prefill_s
        self._segment = _Segment(now, step_s, steps, prompts, prefill_s, batch > 0)
        self._activity = Activity.STEPPING
        self._wake_at(now + steps * step_s)

    @staticmethod
    def _steps_in(seconds: float, gap_s: float) -> int:
        """Steps until a clock that is read after each step has passed `seconds`."""
        if seconds == NEVER_S:
            return UNLIMITED_STEPS
        return max(1, math.ceil((seconds - _EPSILON_S) / gap_s))

    def _end_of_steps(self, now: float) -> None:
        hosted, segment, totals = self._current, self._segment, self.totals
        assert hosted is not None
        assert segment is not None
        queue = hosted.queue
        self._segment = None
        self._steps_done += segment.steps
        totals.prefill_s += segment.prefill_s
        totals.decode_s += segment.steps * segment.gap_s - segment.prefill_s
        hosted.last_run_s = now
        if segment.decodes:
            ended = queue.decoded(segment.start_s, segment.gap_s, segment.steps)
            for request in ended:
                # As if all of it had been saved: never too few bytes go out.
                tokens = request.input_tokens + request.output_tokens
                hosted.held.saved_tokens -= min(hosted.held.saved_tokens, tokens)
                self._on_end(request, queue.runs_of(request), now)
            queue.trim()
            if ended and hosted.parked:
                self._take_in_parked(hosted)
        for request in segment.prompts:
            self._prefilled(hosted, request, now)
        if self._joining:
            for request in self._joining:
                self._start_decoding(hosted, request)
            self._joining.clear()
        over = self._steps_done >= self._turn_ends_at or now >= self._quota_end_s - _EPSILON_S
        if (over and not self._repeating) or not queue.num_open:
            self._end_of_turn(now)
        else:
            self._begin_steps(now)

    def _prefilled(self, hosted: Hosted, request: SimRequest, now: float) -> None:
        request.first = TokenRun(now, 0.0, 1)
        if request.output_tokens == 1:
            hosted.queue.release(request)
            self._on_end(request, [request.first], now)
        elif self.role is Phase.PREFILL:
            hosted.queue.release(request)
            self.on_prefilled(self, request, now)
        else:
            hosted.queue.start_decoding(request)

    def _take_in_parked(self, hosted: Hosted) -> None:
        while hosted.parked and hosted.queue.has_room(hosted.parked[0]):
            request = hosted.parked.popleft()
            hosted.queue.reserve(request)
            self._start_decoding(hosted, request)

    def _end_of_turn(self, now: float) -> None:
        hosted = self._current
        assert hosted is not None
        hosted.view = None
        if not hosted.queue.num_open and not hosted.parked:
            self.open.pop(hosted.model.name, None)
            self.on_closed(self, now)
        if self._spans is not None and now > self._began_s:
            self._spans.append(Span(self.number, hosted.model.name, "run", self._began_s, now))
        self._decide(now)

    # -- what the policy sees --------------------------------------------------------------

    def state(self, now: float) -> PoolState:
        """All models with open requests or device memory, in pool order."""
        memory = self.memory
        memory.settle(now)
        for name in memory.loading:
            self.hosted[name].view = None
        if self._shows_all:
            shown = list(self.hosted.values())
        else:
            named = dict(self.open)
            for name in memory.resident:
                named[name] = self.hosted[name]
            shown = sorted(named.values(), key=_place)
        return PoolState(
            models=tuple([hosted.view or self._look_at(hosted) for hosted in shown]),
            last=self._last,
            free_bytes=memory.free_bytes,
            capacity_bytes=memory.capacity_bytes,
            costs=self.costs,
            arrived=tuple(self._arrived),
        )

    def _look_at(self, hosted: Hosted) -> ModelView:
        queue, model = hosted.queue, hosted.model
        hosted.view = ModelView(
            name=model.name,
            num_running=queue.num_decoding,
            num_waiting=queue.num_waiting,
            has_work=queue.num_open > 0,
            resident=hosted.held.resident,
            blocked_until=hosted.blocked_until,
            work=queue.work(),
            weights_bytes=model.weights_bytes,
            kv_bytes=model.kv_memory_bytes,
            missing_bytes=self.memory.missing_bytes(model.name),
            last_run_s=hosted.last_run_s,
        )
        return hosted.view

    def _forget_views(self) -> None:
        """Residency has changed hands."""
        for name in self.memory.resident:
            self.hosted[name].view = None
        for hosted in self.open.values():
            hosted.view = None


def _nobody_asked(instance: Instance, request: SimRequest, now: float) -> None:
    raise AssertionError(f"instance {instance.number} does both phases")


def _nobody_waits(instance: Instance, now: float) -> None:
    return


def _place(hosted: Hosted) -> int:
    return hosted.place
