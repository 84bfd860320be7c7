"""The definition of on time, against the published worked cases and a token-by-token count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegaeon.core.slo import (
    Attainment,
    TokenDeadlines,
    TokenRun,
    goodput,
    lenient_attainment,
    num_on_time,
    request_on_time,
)

# (deadlines, runs, artefact's formula, strict share), arrival 0
CASES = [
    (
        TokenDeadlines(3, 2),
        [TokenRun(3, 0, 1), TokenRun(6, 1, 3)],
        0.625,
        0.75,
    ),
    (TokenDeadlines(10, 0.1), [TokenRun(10.5, 0, 1), TokenRun(20.5, 0.1, 50)], 0.587, 0.0),
    (
        TokenDeadlines(10, 0.1),
        [TokenRun(1, 0.009, 440), TokenRun(1 + 439 * 0.009 + 42, 0.009, 440)],
        1.0,
        1.0,
    ),
]


@pytest.mark.parametrize(("deadlines", "runs", "lenient", "strict"), CASES)
def test_the_published_cases(
    deadlines: TokenDeadlines, runs: list[TokenRun], lenient: float, strict: float
) -> None:
    asked = sum(run.count for run in runs)
    got = lenient_attainment(deadlines, 0.0, runs, num_tokens_asked=asked)
    assert got == pytest.approx(lenient, abs=0.001)
    assert num_on_time(deadlines, 0.0, runs) / asked == strict


RUNS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=6
)


def runs_of(pieces: list[tuple[int, int, int]]) -> list[TokenRun]:
    runs, now = [], 0.0
    for pause, gap, count in pieces:
        first = now + pause / 4
        runs.append(TokenRun(first, gap / 4, count))
        now = first + (count - 1) * gap / 4
    return runs


@given(RUNS, st.integers(1, 40), st.integers(1, 8))
def test_runs_count_as_their_tokens_would_one_by_one(
    pieces: list[tuple[int, int, int]], ttft: int, tpot: int
) -> None:
    deadlines = TokenDeadlines(ttft / 4, tpot / 4)
    runs = runs_of(pieces)
    times = [run.first_s + j * run.gap_s for run in runs for j in range(run.count)]
    assert num_on_time(deadlines, 0.0, runs) == sum(
        time <= deadlines.due_s(0.0, k) for k, time in enumerate(times)
    )
    # The artefact's loop, as it stands.
    start, credit, target, ok = 0.0, 0.0, deadlines.ttft_s, 0.0
    for time in times:
        if time - start <= target:
            credit = target
        else:
            ok += credit
            start, credit = time, 0.0
        target += deadlines.tpot_s
    ok += min(target, times[-1] - start)
    expected = ok / times[-1] if times[-1] > 0 else 1.0
    got = lenient_attainment(deadlines, 0.0, runs, num_tokens_asked=len(times))
    assert got == pytest.approx(expected)


def test_a_request_with_missing_tokens_has_failed() -> None:
    seen = Attainment()
    runs = [TokenRun(1, 0.01, 98)]
    seen.add(TokenDeadlines(), 0.0, runs, num_tokens_asked=100)
    seen.add(TokenDeadlines(), 0.0, [], num_tokens_asked=50, refused=True)
    assert (seen.num_requests, seen.num_refused) == (2, 1)
    assert (seen.tokens, seen.requests, seen.lenient, seen.in_the_mean) == (98 / 150, 0, 0, 0)


def test_one_late_token_in_a_hundred_is_forgiven_and_two_are_not() -> None:
    assert request_on_time(99, 100)
    assert not request_on_time(98, 100)


def test_goodput_is_the_largest_load_before_the_first_miss() -> None:
    points = [(1, 1.0), (2, 0.95), (4, 0.85), (8, 0.99)]
    assert goodput(points, level=0.9) == pytest.approx(3.0)
    assert goodput(points[:2], level=0.9) == 2
    assert goodput([(1, 0.5)], level=0.9) == 0


def test_deadlines_that_nobody_could_meet_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        TokenDeadlines(0, 0.1)
