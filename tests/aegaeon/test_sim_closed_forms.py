"""The simulator against formulas that need none."""

from __future__ import annotations

import math
import random

import pytest
from sim_support import SMALL, model

from aegaeon.sched.cost import Profile
from aegaeon.sched.policies.paper import Q_MAX_S, BatchedDecoding
from aegaeon.sched.scheduler import Phase
from aegaeon.sim.instance import STEP_TOKENS
from aegaeon.sim.simulator import Request, Simulation


@pytest.mark.parametrize("load", [0.3, 0.45])
def test_waiting_times_are_those_of_the_queue_with_constant_service(load):
    """M/D/1: D * rho / (2 * (1 - rho)). A prompt that fills a step, one token of output."""
    service_s, number = 0.1, 60_000
    dice = random.Random(5)
    now, requests = 0.0, []
    for _ in range(number):
        now += dice.expovariate(load / service_s)
        requests.append(Request(now, "m", STEP_TOKENS, 1))
    served = model("m", profile=Profile(0.01, 0.0, 0.0, service_s, 0.0))
    result = Simulation([served], [SMALL], "fcfs").run(requests)
    waits = [first_s - service_s for first_s in result.first_s[100:]]
    mean = sum(waits) / len(waits)
    assert mean == pytest.approx(service_s * load / (2 * (1 - load)), rel=0.02)


def test_the_number_of_active_models_is_that_of_the_theorem():
    """E[m] = M * (1 - exp(-lambda * T)), each model on a GPU of its own."""
    models, rate, tokens, step_s = 20, 0.5, 101, 0.01
    dice = random.Random(3)
    requests = []
    for index in range(models):
        now = dice.expovariate(rate)
        while now < 3000:
            requests.append(Request(now, f"m{index}", 1, tokens))
            now += dice.expovariate(rate)
    served = [
        model(f"m{i}", 10.0, profile=Profile(step_s, 0.0, 0.0, step_s, 0.0)) for i in range(models)
    ]
    result = Simulation(served, [SMALL.sized(models)], "static").run(sorted(requests))
    # A prompt delays those that decode: what is busy is counted, not how long a request takes.
    split = result.time_split()
    active = models * (split["prefill"] + split["decode"])
    expected = models * (1 - math.exp(-rate * tokens * step_s))
    assert active == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("switch_s", [0.1, 0.3, 0.65, 0.8])
def test_as_many_batches_keep_pace_as_quotas_and_switches_leave_room_for(switch_s):
    """B_max = n / (1 + s / Q_MAX), where the quota is Q_MAX: every turn pays one switch."""
    step_s, batches = 0.1 / 7.0, 8
    served = [
        model(f"m{i}", 14.0, profile=Profile(step_s, 0.0, 0.0, 0.001, 0.0)) for i in range(batches)
    ]
    group = SMALL.__class__(
        SMALL.gpu, 1, memory_share=0.8, link_share=1e9, switch_s=switch_s, prefetch=False
    )
    tokens = 6000
    last: list[float] = []
    simulation = Simulation(
        served,
        [group],
        "batched decoding",
        make=lambda: BatchedDecoding(phase=Phase.BOTH),
        on_request=lambda request, runs: last.append(runs[-1].first_s),
    )
    simulation.run([Request(0.0, f"m{i}", 1, tokens) for i in range(batches)])
    # All requests run side by side until the first ends: the pace at which 8 batches get tokens.
    pace = tokens / min(last)
    kept_up = batches * pace * 0.1
    assert kept_up == pytest.approx(7.0 / (1 + switch_s / Q_MAX_S), rel=0.05)
