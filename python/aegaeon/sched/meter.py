"""What the requests of one model got, against their objectives, as it happens.

The definitions are those of `core/slo.py`. A token counts when it leaves the engine, against the
arrival of its request at the server. Written by the step loop's thread, readable from any.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aegaeon.core.config import Slo
from aegaeon.core.slo import (
    TokenDeadlines,
    TokenRun,
    is_on_time,
    num_on_time,
    request_on_time,
)

# For quantiles of the recent past.
SAMPLES_KEPT = 512


@dataclass
class SloCounts:
    """Sums since the start; monotone.

    requests_met, requests_missed: that have ended, with at least 99 % of their tokens on time, or
    not. requests_withdrawn: that their client gave up before any deadline had passed, and before
    the first token; they are in neither.
    """

    tokens: int = 0
    tokens_on_time: int = 0
    requests_met: int = 0
    requests_missed: int = 0
    requests_withdrawn: int = 0


@dataclass(slots=True)
class _Open:
    arrival_s: float
    deadlines: TokenDeadlines
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    num_on_time: int = 0


class Meter:
    """The requests of one model. slo: of those that bring none of their own.

    A request that was stopped from outside (its client went away, or a stop string was found) is
    judged by the tokens that it got, and by the next one if that was overdue.
    """

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        self.counts = SloCounts()
        self._open: dict[str, _Open] = {}
        self._ttft_s: deque[float] = deque(maxlen=SAMPLES_KEPT)
        self._tpot_s: deque[float] = deque(maxlen=SAMPLES_KEPT)

    def arrived(
        self,
        request_id: str,
        arrival_s: float,
        *,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
    ) -> None:
        """A request has come; ttft_ms, tpot_ms: its own objectives, None: the model's."""
        deadlines = TokenDeadlines(
            (ttft_ms or self.slo.ttft_ms) / 1e3, (tpot_ms or self.slo.tpot_ms) / 1e3
        )
        self._open[request_id] = _Open(arrival_s, deadlines)

    def produced(self, request_id: str, num_tokens: int, now: float) -> None:
        """Its next tokens are there. A request that is not open is ignored: it was aborted."""
        request = self._open.get(request_id)
        if request is None or num_tokens == 0:
            return
        if request.num_tokens == 0:
            request.first_s = now
            self._ttft_s.append(now - request.arrival_s)
        # Mostly one; how many of several is then the same as for a run without gaps.
        on_time = int(is_on_time(request.deadlines, request.arrival_s, request.num_tokens, now))
        if num_tokens > 1:
            run = TokenRun(now, 0.0, num_tokens)
            on_time = num_on_time(
                request.deadlines, request.arrival_s, (run,), first_idx=request.num_tokens
            )
        request.last_s = now
        request.num_tokens += num_tokens
        request.num_on_time += on_time
        self.counts.tokens += num_tokens
        self.counts.tokens_on_time += on_time

    def finished(self, request_id: str) -> None:
        """It has all its tokens."""
        request = self._open.pop(request_id, None)
        if request is not None:
            self._judge(request, request.num_tokens)

    def stopped(self, request_id: str, now: float) -> None:
        """It was stopped from outside, by its client or by a stop string."""
        request = self._open.pop(request_id, None)
        if request is None:
            return
        overdue = now > request.deadlines.due_s(request.arrival_s, request.num_tokens)
        if request.num_tokens == 0 and not overdue:
            self.counts.requests_withdrawn += 1
        else:
            self._judge(request, request.num_tokens + overdue)

    def broken(self, request_id: str) -> None:
        """The engine has given it up."""
        if self._open.pop(request_id, None) is not None:
            self.counts.requests_missed += 1

    def failed(self) -> None:
        """The engine is out of service: all open requests ended without their tokens."""
        self.counts.requests_missed += len(self._open)
        self._open.clear()

    @property
    def ttft_s(self) -> Sequence[float]:
        """Seconds to the first token, of the last requests that got one; in no order."""
        return list(self._ttft_s)

    @property
    def tpot_s(self) -> Sequence[float]:
        """Mean seconds per token after the first, of the last requests that ended; in no order."""
        return list(self._tpot_s)

    def _judge(self, request: _Open, num_tokens_asked: int) -> None:
        if request.num_tokens > 1:
            self._tpot_s.append((request.last_s - request.first_s) / (request.num_tokens - 1))
        if request_on_time(request.num_on_time, num_tokens_asked):
            self.counts.requests_met += 1
        else:
            self.counts.requests_missed += 1


def attainment_of(meter: Meter) -> dict[str, Any]:
    """As plain values: objectives, sums, and p50 and p99 of the recent past. Seconds."""
    return {
        "ttft_s": meter.slo.ttft_ms / 1e3,
        "tpot_s": meter.slo.tpot_ms / 1e3,
        **asdict(meter.counts),
        "recent": {
            name: {
                "count": len(samples),
                "p50": quantile(samples, 0.5),
                "p99": quantile(samples, 0.99),
            }
            for name, samples in (("ttft_s", meter.ttft_s), ("tpot_s", meter.tpot_s))
        },
    }


def quantile(samples: Sequence[float], share: float) -> float | None:
    """The smallest sample that at least `share` of them do not exceed; None when there is none."""
    if not samples:
        return None
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]
