"""How fast is the simulator?

    pytest bench/bench_sim.py           (with --keep-results the figures go to results/)

Timed is `Simulation.run`, in processor time of one core; the workload is generated before. What it
costs is the number of turns that a policy takes: a turn is a decision of the real policy over the
real state. So there are scenarios with few turns per request and with many.

Limit: none that is known. Goal: 1,000,000 requests in 60 s.
"""

import time

import pytest

from aegaeon.sim.presets import preset
from aegaeon.sim.simulator import Simulation

# (preset, policy, turns at least, requests)
CASES = [
    ("azure-code-like", "slack", 0.0, 1_000_000),
    ("azure-code-like", "request-level", 0.0, 20_000),
    ("aegaeon-0.5", "request-level", 0.0, 20_000),
    ("aegaeon-0.5", "paper", 0.1, 4_000),
    ("aegaeon-0.5", "slack", 0.1, 4_000),
    ("aegaeon-0.1", "slack", 0.1, 2_000),
    ("aegaeon-0.5", "slack", 0.0, 1_000),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "policy", "shortest_s", "number"), CASES)
def test_requests_are_simulated(record, name, policy, shortest_s, number):
    scenario = preset(name)
    rate = sum(load.rate for load in scenario.loads)
    scenario = scenario.lasting(1.02 * number / rate)
    began = time.process_time()
    requests = scenario.requests(0)[:number]
    generated = time.process_time()
    simulation = Simulation(scenario.models, scenario.groups, policy, shortest_turn_s=shortest_s)
    started = time.process_time()
    result = simulation.run(requests)
    seconds = time.process_time() - started
    whole = result.attainment
    assert whole.num_requests == len(requests) > 0.9 * number
    assert whole.num_tokens == sum(request.output_tokens for request in requests)
    turns = sum(totals.turns for _, totals in result.instances)
    record(
        f"{name}, {policy}, turns of at least {shortest_s:g} s",
        None,
        num_requests=len(requests),
        generate_s=generated - began,
        simulate_s=seconds,
        us_per_request=seconds / len(requests) * 1e6,
        turns_per_request=turns / len(requests),
        us_per_turn=seconds / turns * 1e6,
        tokens_on_time=whole.tokens,
        simulated_hours=result.end_s / 3600,
    )
