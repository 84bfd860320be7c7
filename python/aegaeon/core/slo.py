"""When a token is on time: the one definition that the server, the simulator and the tests share.

Token k (from 0) of a request is due at ``arrival + TTFT + k * TPOT``. Being ahead is slack that may
be used up later; being late moves no deadline. Times are seconds on any one clock.

Tokens are given as runs, because that is how an engine emits them: a request in an undisturbed
batch gets a token every step. A single token is a run of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# How a request carries objectives of its own, in milliseconds: to the server as HTTP headers, from
# there to the engine as vLLM's `vllm_xargs`, which a client may also send itself.
SLO_HEADERS: Mapping[str, str] = {
    "x-slo-ttft-ms": "slo_ttft_ms",
    "x-slo-tpot-ms": "slo_tpot_ms",
}
# A request counts as on time when this share of its tokens is.
REQUEST_SHARE = 0.99
# Two sums of the same seconds may differ in the last bits; nothing real is this short.
_EPSILON_S = 1e-9


def objective_ms(value: object) -> float | None:
    """A time above 0 in milliseconds, as a number or its decimal text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        milliseconds = float(value)
    except (ValueError, OverflowError):
        return None
    return milliseconds if 0 < milliseconds < math.inf else None


@dataclass(frozen=True, slots=True)
class TokenRun:
    """`count` tokens, the first at `first_s`, each next one `gap_s` later."""

    first_s: float
    gap_s: float
    count: int


@dataclass(frozen=True)
class TokenDeadlines:
    """The objective of one request: seconds to the first token, and seconds per token after it."""

    ttft_s: float = 10.0
    tpot_s: float = 0.1

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0):
            raise ValueError(f"expected times above 0, got {self.ttft_s} s and {self.tpot_s} s")

    def due_s(self, arrival_s: float, token_idx: int) -> float:
        """When the token is due."""
        return arrival_s + self.ttft_s + token_idx * self.tpot_s

    def scaled(self, factor: float) -> TokenDeadlines:
        """Both times multiplied: 0.2 makes 10 s / 100 ms into 2 s / 20 ms."""
        return TokenDeadlines(self.ttft_s * factor, self.tpot_s * factor)


def is_on_time(deadlines: TokenDeadlines, arrival_s: float, token_idx: int, time_s: float) -> bool:
    """Whether one token, at `time_s`, meets its deadline."""
    return time_s <= deadlines.due_s(arrival_s, token_idx) + _EPSILON_S


def num_on_time(
    deadlines: TokenDeadlines, arrival_s: float, runs: Iterable[TokenRun], *, first_idx: int = 0
) -> int:
    """How many tokens of the runs meet their deadlines; the first one has number `first_idx`."""
    total = 0
    for run in runs:
        slack_s = deadlines.due_s(arrival_s, first_idx) - run.first_s + _EPSILON_S
        # Token j of the run has slack slack_s + j * gain_s, a line: one crossing at most.
        gain_s = deadlines.tpot_s - run.gap_s
        first_idx += run.count
        if slack_s >= 0:
            if gain_s >= 0:
                total += run.count
            else:
                total += min(run.count, math.floor(slack_s / -gain_s) + 1)
        elif gain_s > 0:
            total += max(0, run.count - math.ceil(-slack_s / gain_s))
    return total


def request_on_time(num_tokens_on_time: int, num_tokens_asked: int) -> bool:
    """Whether at least 99 % of the tokens asked for came, and came on time."""
    return num_tokens_on_time >= REQUEST_SHARE * num_tokens_asked


def lenient_attainment(
    deadlines: TokenDeadlines, arrival_s: float, runs: Sequence[TokenRun], *, num_tokens_asked: int
) -> float:
    """The formula of the published artefact, for comparison with its figures only.

    The share of the request's span that lies before its deadlines, where a late token starts the
    clock anew without giving back the slack granted before. 0 when tokens are missing.
    """
    if sum(run.count for run in runs) < num_tokens_asked or not runs:
        return 0.0
    start_s, credit_s, target_s, ok_s = arrival_s, 0.0, deadlines.ttft_s, 0.0
    time_s = arrival_s
    for run in runs:
        done = 0
        while done < run.count:
            time_s = run.first_s + done * run.gap_s
            if time_s - start_s > target_s + _EPSILON_S:
                ok_s += credit_s
                start_s, credit_s = time_s, 0.0
                target_s += deadlines.tpot_s
                done += 1
                continue
            # On time, and so are the next ones for as long as the line stays below the target.
            loss_s = run.gap_s - deadlines.tpot_s
            ahead = run.count - done
            if loss_s > 0:
                spare_s = target_s + _EPSILON_S - (time_s - start_s)
                ahead = min(ahead, math.floor(spare_s / loss_s) + 1)
            target_s += ahead * deadlines.tpot_s
            credit_s = target_s - deadlines.tpot_s
            done += ahead
            time_s = run.first_s + (done - 1) * run.gap_s
    ok_s += min(target_s, time_s - start_s)
    span_s = time_s - arrival_s
    return ok_s / span_s if span_s > 0 else 1.0


def meets_means(
    deadlines: TokenDeadlines, arrival_s: float, first_s: float, last_s: float, num_tokens: int
) -> bool:
    """The objective in the sense of DistServe and `vllm bench serve --goodput`: the first token in
    time, and the mean time per token after it. Blind to a pause inside the request.
    """
    mean_s = (last_s - first_s) / (num_tokens - 1) if num_tokens > 1 else 0.0
    return (
        first_s - arrival_s <= deadlines.ttft_s + _EPSILON_S
        and mean_s <= deadlines.tpot_s + _EPSILON_S
    )


@dataclass
class Attainment:
    """Sums over requests. A request that was refused or not finished counts with the tokens that it
    asked for, and none, or those that came, on time.
    """

    num_requests: int = 0
    num_requests_on_time: int = 0
    num_requests_in_the_mean: int = 0
    num_refused: int = 0
    num_tokens: int = 0
    num_tokens_on_time: int = 0
    lenient_sum: float = 0.0

    def add(
        self,
        deadlines: TokenDeadlines,
        arrival_s: float,
        runs: Sequence[TokenRun],
        *,
        num_tokens_asked: int,
        refused: bool = False,
    ) -> None:
        """Count one request that has ended."""
        on_time = num_on_time(deadlines, arrival_s, runs)
        self.num_requests += 1
        self.num_refused += refused
        self.num_tokens += num_tokens_asked
        self.num_tokens_on_time += on_time
        self.num_requests_on_time += request_on_time(on_time, num_tokens_asked)
        if not runs or sum(run.count for run in runs) < num_tokens_asked:
            return
        self.lenient_sum += lenient_attainment(
            deadlines, arrival_s, runs, num_tokens_asked=num_tokens_asked
        )
        last = runs[-1]
        self.num_requests_in_the_mean += meets_means(
            deadlines,
            arrival_s,
            runs[0].first_s,
            last.first_s + (last.count - 1) * last.gap_s,
            num_tokens_asked,
        )

    def merge(self, other: Attainment) -> None:
        """Add what another one has counted."""
        self.num_requests += other.num_requests
        self.num_requests_on_time += other.num_requests_on_time
        self.num_requests_in_the_mean += other.num_requests_in_the_mean
        self.num_refused += other.num_refused
        self.num_tokens += other.num_tokens
        self.num_tokens_on_time += other.num_tokens_on_time
        self.lenient_sum += other.lenient_sum

    @property
    def tokens(self) -> float:
        """Share of tokens on time. Without a token: 1."""
        return self.num_tokens_on_time / self.num_tokens if self.num_tokens else 1.0

    @property
    def requests(self) -> float:
        """Share of requests with at least 99 % of their tokens on time. Without a request: 1."""
        return self.num_requests_on_time / self.num_requests if self.num_requests else 1.0

    @property
    def in_the_mean(self) -> float:
        """Share of requests that meet TTFT and mean TPOT."""
        return self.num_requests_in_the_mean / self.num_requests if self.num_requests else 1.0

    @property
    def lenient(self) -> float:
        """Mean of the artefact's formula."""
        return self.lenient_sum / self.num_requests if self.num_requests else 1.0


def goodput(points: Iterable[tuple[float, float]], *, level: float) -> float:
    """The largest load that is served with attainment of at least `level`, 0 when none is.

    points: (load, attainment), in any order. Between the last load that reaches the level and the
    first beyond it that does not, the line between the two decides; a level that is reached again
    after it was missed does not count.
    """
    best, previous = 0.0, None
    for load, attained in sorted(points):
        if attained < level:
            if previous is None:
                return 0.0
            load_0, attained_0 = previous
            return load_0 + (load - load_0) * (attained_0 - level) / (attained_0 - attained)
        best, previous = load, (load, attained)
    return best
