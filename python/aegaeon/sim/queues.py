"""The open requests of one model on one instance, in sums that cost nothing per token.

All requests that decode together get their tokens in the same steps, so a step is recorded once, as
part of a run of equal steps, and a request is a pair of places in that record. `work` is what
`sched.OpenRequests` would say of the same requests (a test compares them).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from heapq import heappop, heappush

from aegaeon.core.slo import TokenRun
from aegaeon.sched.scheduler import NO_WORK, Work
from aegaeon.sim.hardware import Model

# Longest record of steps kept; what no open request needs any more is cut off.
_RECORDED = 4096


class SimRequest:
    """One request on its way. `first` is the run of its first token, when it has one."""

    __slots__ = (
        "arrival_s",
        "base_s",
        "first",
        "input_tokens",
        "model",
        "number",
        "output_tokens",
        "since",
    )

    def __init__(
        self, number: int, model: str, arrival_s: float, input_tokens: int, output_tokens: int
    ) -> None:
        self.number = number
        self.model = model
        self.arrival_s = arrival_s
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.first: TokenRun | None = None
        self.base_s = 0.0
        self.since = 0


class ModelQueue:
    """Waiting requests in order of arrival, decoding ones by when they end."""

    __slots__ = (
        "_bases",
        "_cut",
        "_ends",
        "_kv_tokens",
        "_oldest_s",
        "_priority",
        "_record",
        "_reserved",
        "_steps",
        "_tpot_s",
        "_ttft_s",
        "context_tokens",
        "prefill_tokens",
        "waiting",
    )

    def __init__(self, model: Model) -> None:
        self._ttft_s = model.deadlines.ttft_s
        self._tpot_s = model.deadlines.tpot_s
        self._priority = model.priority
        self._kv_tokens = model.kv_tokens
        self.waiting: deque[SimRequest] = deque()
        self.prefill_tokens = 0
        self.context_tokens = 0
        # (step in which it ends, number, request); steps are counted since the model was added.
        self._ends: list[tuple[int, int, SimRequest]] = []
        self._steps = 0
        self._reserved = 0
        self._record: list[TokenRun] = []
        self._cut = 0
        # Of the decoding ones: the earliest arrival, and the due times at step 0, sorted.
        self._oldest_s = math.inf
        self._bases: list[float] = []

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_decoding(self) -> int:
        return len(self._ends)

    @property
    def num_open(self) -> int:
        return len(self.waiting) + len(self._ends)

    @property
    def steps_to_next_end(self) -> int:
        """Steps until the first of the decoding requests has all its tokens."""
        return self._ends[0][0] - self._steps

    def arrive(self, request: SimRequest) -> None:
        """Its prompt is to be computed here."""
        self.waiting.append(request)
        self.prefill_tokens += request.input_tokens

    def has_room(self, request: SimRequest) -> bool:
        """Whether the KV cache holds all its tokens beside those of the others."""
        return self._reserved + request.input_tokens + request.output_tokens <= self._kv_tokens

    def take_prompts(
        self, *, max_requests: int, max_tokens: int, come_by_s: float = math.inf
    ) -> list[SimRequest]:
        """The oldest waiting requests that one step takes: the first whatever its length, further
        ones while they fit. Their KV cache is reserved, up to their last token.

        come_by_s: those that came later are not known yet.
        """
        taken: list[SimRequest] = []
        tokens = 0
        while self.waiting and len(taken) < max_requests:
            request = self.waiting[0]
            tokens += request.input_tokens
            if request.arrival_s > come_by_s or (taken and tokens > max_tokens):
                break
            if not self.has_room(request):
                break
            self.waiting.popleft()
            self._reserved += request.input_tokens + request.output_tokens
            self.prefill_tokens -= request.input_tokens
            taken.append(request)
        return taken

    def reserve(self, request: SimRequest) -> None:
        """Its prompt was computed elsewhere."""
        self._reserved += request.input_tokens + request.output_tokens

    def release(self, request: SimRequest) -> None:
        """It goes on elsewhere, or has ended."""
        self._reserved -= request.input_tokens + request.output_tokens

    def start_decoding(self, request: SimRequest) -> None:
        """It has its first token and takes part in the steps from now on."""
        request.since = self._cut + len(self._record)
        request.base_s = request.arrival_s + self._ttft_s + (1 - self._steps) * self._tpot_s
        heappush(self._ends, (self._steps + request.output_tokens - 1, request.number, request))
        self.context_tokens += request.input_tokens + 1
        insort(self._bases, request.base_s)
        self._oldest_s = min(self._oldest_s, request.arrival_s)

    def decoded(self, start_s: float, gap_s: float, steps: int) -> list[SimRequest]:
        """`steps` steps, `gap_s` each, began at `start_s`; the requests that have ended with them.

        No more steps than `steps_to_next_end`.
        """
        ends = self._ends
        self._record.append(TokenRun(start_s + gap_s, gap_s, steps))
        self._steps += steps
        self.context_tokens += steps * len(ends)
        ended: list[SimRequest] = []
        while ends and ends[0][0] <= self._steps:
            request = heappop(ends)[2]
            self.context_tokens -= request.input_tokens + request.output_tokens
            self._reserved -= request.input_tokens + request.output_tokens
            ended.append(request)
        if ended:
            self._forget(ended)
        return ended

    def runs_of(self, request: SimRequest) -> list[TokenRun]:
        """All tokens of a request that has just ended; ask before the next `decoded`."""
        assert request.first is not None
        return [request.first, *self._record[request.since - self._cut :]]

    def trim(self) -> None:
        """Cut off the record before the steps of the requests that are open."""
        if not self._ends:
            self._cut += len(self._record)
            self._record.clear()
        elif len(self._record) > _RECORDED:
            cut = min(request.since for _, _, request in self._ends) - self._cut
            del self._record[:cut]
            self._cut += cut

    def work(self) -> Work:
        """The sum of the open requests."""
        waiting = self.waiting
        if not waiting and not self._ends:
            return NO_WORK
        first = waiting[0] if waiting else None
        waiting_s = math.inf if first is None else first.arrival_s
        shift = self._steps * self._tpot_s
        return Work(
            oldest_arrival_s=min(waiting_s, self._oldest_s),
            oldest_waiting_s=waiting_s,
            tpot_s=self._tpot_s,
            first_dues_s=tuple(request.arrival_s + self._ttft_s for request in waiting),
            next_dues_s=tuple(base + shift for base in self._bases),
            priority=self._priority,
            first_prompt_tokens=0 if first is None else first.input_tokens,
            prefill_tokens=self.prefill_tokens,
            context_tokens=self.context_tokens,
        )

    def _forget(self, ended: list[SimRequest]) -> None:
        """Keep the due times and the earliest arrival of those that are left."""
        ends = self._ends
        for request in ended:
            del self._bases[bisect_left(self._bases, request.base_s)]
        if not ends:
            self._oldest_s = math.inf
            return
        if any(request.arrival_s <= self._oldest_s for request in ended):
            self._oldest_s = min(request.arrival_s for _, _, request in ends)
