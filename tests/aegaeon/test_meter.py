"""What the server counts of SLOs agrees with the definitions in core/slo.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegaeon.core.config import Slo
from aegaeon.core.slo import Attainment, TokenDeadlines, TokenRun
from aegaeon.sched.meter import Meter, SloCounts, attainment_of, quantile

SLO = Slo(ttft_ms=1000.0, tpot_ms=100.0)


def test_tokens_are_on_time_by_the_schedule_of_their_request():
    meter = Meter(SLO)
    meter.arrived("r", 10.0)
    for now in (11.0, 11.05, 11.5):  # due at 11.0, 11.1, 11.2
        meter.produced("r", 1, now)
    meter.finished("r")
    assert meter.counts == SloCounts(tokens=3, tokens_on_time=2, requests_missed=1)
    assert meter.ttft_s == [1.0]
    assert meter.tpot_s == [pytest.approx(0.25)]


def test_a_requests_own_objectives_replace_those_of_the_model():
    meter = Meter(SLO)
    meter.arrived("patient", 0.0, ttft_ms=60_000)
    meter.arrived("hasty", 0.0, ttft_ms=1)
    for name in ("patient", "hasty"):
        meter.produced(name, 1, 2.0)
        meter.finished(name)
    assert (meter.counts.requests_met, meter.counts.requests_missed) == (1, 1)


def test_several_tokens_of_one_step_have_deadlines_of_their_own():
    meter = Meter(SLO)
    meter.arrived("r", 0.0)
    meter.produced("r", 3, 1.1)  # due at 1.0, 1.1, 1.2
    assert meter.counts.tokens_on_time == 2


def test_what_is_stopped_is_judged_by_what_it_got_and_by_what_was_overdue():
    meter = Meter(SLO)
    for name in ("left early", "left waiting", "stop string", "left at a pause"):
        meter.arrived(name, 0.0)
    meter.stopped("left early", 0.5)
    assert meter.counts == SloCounts(requests_withdrawn=1)
    meter.stopped("left waiting", 1.5)
    assert meter.counts.requests_missed == 1
    for name in ("stop string", "left at a pause"):
        meter.produced(name, 1, 0.9)
    meter.stopped("stop string", 0.95)
    assert meter.counts.requests_met == 1
    meter.stopped("left at a pause", 3.0)
    assert meter.counts.requests_missed == 2
    meter.stopped("never seen", 3.0)
    meter.produced("never seen", 1, 3.0)
    assert meter.counts.tokens == 2


def test_what_the_engine_gives_up_has_missed_and_all_when_it_fails():
    meter = Meter(SLO)
    meter.arrived("a", 0.0)
    meter.arrived("b", 0.0)
    meter.arrived("c", 0.0)
    meter.broken("c")
    meter.broken("c")
    assert meter.counts == SloCounts(requests_missed=1)
    meter.failed()
    meter.finished("a")
    assert meter.counts == SloCounts(requests_missed=3)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 5), st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 4)), min_size=1)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_the_sums_are_those_of_attainment(requests):
    meter, reference = Meter(SLO), Attainment()
    deadlines = TokenDeadlines(1.0, 0.1)
    for number, (arrival_s, steps) in enumerate(requests):
        meter.arrived(str(number), arrival_s)
        now, runs = arrival_s, []
        for pause_s, count in steps:
            now += pause_s
            meter.produced(str(number), count, now)
            runs.append(TokenRun(now, 0.0, count))
        meter.finished(str(number))
        asked = sum(count for _, count in steps)
        reference.add(deadlines, arrival_s, runs, num_tokens_asked=asked)
    counts = meter.counts
    assert counts.tokens == reference.num_tokens
    assert counts.tokens_on_time == reference.num_tokens_on_time
    assert counts.requests_met == reference.num_requests_on_time
    assert counts.requests_met + counts.requests_missed == reference.num_requests


def test_quantiles_are_samples():
    assert quantile([], 0.5) is None
    assert quantile([3.0], 0.99) == 3.0
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert quantile([float(n) for n in range(100)], 0.99) == 98.0


def test_the_plain_values_have_quantiles_of_the_recent_past():
    meter = Meter(SLO)
    meter.arrived("r", 0.0)
    meter.produced("r", 1, 0.5)
    plain = attainment_of(meter)
    assert (plain["ttft_s"], plain["tokens"]) == (1.0, 1)
    assert plain["recent"]["ttft_s"] == {"count": 1, "p50": 0.5, "p99": 0.5}
    assert plain["recent"]["tpot_s"] == {"count": 0, "p50": None, "p99": None}
