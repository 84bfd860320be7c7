"""The simulator: nothing is lost, nothing is made up, and it does what the live loop does."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_support import GB, SMALL, model, random_requests, step_loop_times, token_times

from aegaeon.core.errors import ConfigError
from aegaeon.core.slo import TokenRun
from aegaeon.sched.cost import Profile
from aegaeon.sched.open_requests import OpenRequests
from aegaeon.sched.policies import make_policy
from aegaeon.sched.scheduler import RequestView
from aegaeon.sim.hardware import GPUS, SHAPES, GpuGroup, Model, profile_of
from aegaeon.sim.memory import DeviceMemory
from aegaeon.sim.queues import ModelQueue, SimRequest
from aegaeon.sim.routing import MOST_WAIT_S, place
from aegaeon.sim.simulator import SIM_POLICIES, Request, Simulation

SCENARIOS = st.tuples(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.sampled_from(SIM_POLICIES)
)


@settings(max_examples=60, deadline=None)
@given(SCENARIOS, st.sampled_from([0.0, 0.05]))
def test_every_token_comes_once_and_all_time_is_accounted_for(scenario, shortest_s):
    seed, num_models, instances, policy = scenario
    dice = random.Random(seed)
    models = [
        model(f"m{i}", dice.choice([2.0, 5.0, 9.0]), kv_bytes_per_token=dice.choice([0, 10**6]))
        for i in range(num_models)
    ]
    requests = random_requests(dice, num_models, dice.randint(1, 30), within_s=dice.uniform(0, 20))
    seen: dict[int, list[TokenRun]] = {}

    def simulate():
        return Simulation(
            models,
            [SMALL.sized(instances)],
            policy,
            shortest_turn_s=shortest_s,
            on_request=lambda request, runs: seen.__setitem__(request.number, runs),
        ).run(requests)

    result = simulate()
    whole = result.attainment
    assert whole.num_requests == len(requests)
    assert whole.num_tokens == sum(request.output_tokens for request in requests)
    assert len(seen) == len(requests) - whole.num_refused
    assert policy == "static" or whole.num_refused == 0
    for number, runs in seen.items():
        request = requests[number]
        assert sum(run.count for run in runs) == request.output_tokens
        times = [run.first_s + i * run.gap_s for run in runs for i in range(run.count)]
        assert times == sorted(times)
        assert times[0] > request.at_s
    split = result.time_split()
    assert sum(split.values()) == pytest.approx(1.0)
    assert all(-1e-9 <= share <= 1 for share in split.values())
    again = simulate()
    assert (again.by_model, again.first_s) == (result.by_model, result.first_s)


def assert_same(ours: dict[int, list[float]], live: dict[int, list[float]]) -> None:
    assert ours.keys() == live.keys()
    for number, times in ours.items():
        assert times == pytest.approx(live[number], abs=1e-6), number


@pytest.mark.parametrize("policy", ["slack", "fcfs", "request-level", "round-robin"])
def test_every_token_comes_when_the_live_step_loop_brings_it(policy):
    for seed in range(8):
        dice = random.Random(seed)
        models = [model(f"m{i}", dice.choice([3.0, 5.0, 8.0])) for i in range(4)]
        # All at the beginning: the live loop takes the time at which it first sees a request.
        requests = random_requests(dice, 4, 16, within_s=0.0)
        live = step_loop_times(models, SMALL, make_policy(policy), requests)
        assert_same(token_times(models, [SMALL], policy, requests), live)


def test_requests_that_come_later_join_as_in_the_live_step_loop():
    for seed in range(8):
        dice = random.Random(seed)
        models = [model(f"m{i}", dice.choice([3.0, 5.0, 8.0])) for i in range(3)]
        requests = random_requests(dice, 3, 25, within_s=12.0)
        live = step_loop_times(models, SMALL, make_policy("round-robin"), requests)
        assert_same(token_times(models, [SMALL], "round-robin", requests), live)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(2, 12)), min_size=1, max_size=8), st.data()
)
def test_the_sum_of_open_requests_is_that_of_the_scheduler(sizes, data):
    queue = ModelQueue(model("a"))
    reference = OpenRequests()
    coming = [SimRequest(i, "a", float(i), *size) for i, size in enumerate(sizes)]
    now = 0.0
    for _ in range(40):
        if coming and data.draw(st.booleans()):
            request = coming.pop(0)
            queue.arrive(request)
            reference.add(RequestView(str(request.number), request.arrival_s, request.input_tokens))
        elif queue.num_decoding and data.draw(st.booleans()):
            steps = data.draw(st.integers(1, queue.steps_to_next_end))
            ended = queue.decoded(now, 0.01, steps)
            reference.decoded_all(tokens=steps)
            for request in ended:
                reference.remove(str(request.number))
            queue.trim()
            now += steps * 0.01
        elif queue.waiting:
            (request,) = queue.take_prompts(max_requests=1, max_tokens=1)
            request.first = TokenRun(now, 0.0, 1)
            queue.start_decoding(request)
            reference.prefilled(str(request.number))
        ours, theirs = queue.work(), reference.work
        assert ours.next_dues_s == pytest.approx(theirs.next_dues_s)
        assert replace(ours, next_dues_s=()) == replace(theirs, next_dues_s=())


def test_a_switch_copies_out_what_the_host_lacks_and_in_what_the_device_lacks():
    live = {"a": 100, "b": 50}
    memory = DeviceMemory(capacity_bytes=12 * GB, link_bytes_per_s=1e9, is_busy=lambda name: True)
    for name in live:
        memory.add(
            model(name, 8.0, kv_bytes_per_token=10**7, kv_memory_bytes=2 * GB),
            lambda name=name: live[name],
        )
    assert memory.activate("a", (), 0.0).seconds == pytest.approx(9.0)
    there = memory.activate("b", (), 10.0)
    # Beside b there is room for the KV cache of a, which costs least to bring back: it stays.
    assert (there.bytes_out, there.bytes_in) == (0.0, 8.5 * GB)
    assert memory.missing_bytes("a") == 8 * GB
    assert memory.activate("b", (), 20.0) is None
    assert memory.free_bytes == 0
    assert not memory.is_resident("a")


def test_what_was_prefetched_is_not_copied_again():
    memory = DeviceMemory(capacity_bytes=20 * GB, link_bytes_per_s=1e9, is_busy=lambda name: True)
    for name in "ab":
        memory.add(model(name, 8.0), lambda: 0)
    memory.activate("a", (), 0.0)
    assert memory.prefetch("b", 8.0)
    memory.settle(11.0)
    assert memory.missing_bytes("b") == 5 * GB
    switch = memory.activate("b", (), 12.0)
    assert (switch.path, switch.seconds) == ("warm", pytest.approx(4.0))
    assert memory.activate("a", (), 17.0).path == "hot"


def test_weights_that_came_ahead_make_a_switch_without_copies():
    memory = DeviceMemory(capacity_bytes=20 * GB, link_bytes_per_s=1e9, is_busy=lambda name: True)
    for name in "ab":
        memory.add(model(name, 8.0), lambda: 0)
    memory.activate("a", (), 0.0)
    memory.prefetch("b", 8.0)
    switch = memory.activate("b", (), 30.0)
    assert (switch.path, switch.seconds) == ("ahead", 0.0)


def test_a_model_larger_than_its_gpus_is_refused_with_the_sizes():
    with pytest.raises(ConfigError, match=r"'m0' needs 80\.0 GB of weights \+ 1\.0 GB .* 16\.0 GB"):
        Simulation([model("m0", 80.0)], [SMALL], "slack")
    with pytest.raises(ConfigError, match="no GPUs with tp 4, which these models want: m0"):
        Simulation([model("m0", 80.0, tp=4)], [SMALL], "slack")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0.0, "x", 1, 1), "'x', a model that the pool lacks"),
        (Request(0.0, "m0", 900, 200), r"900 \+ 200 tokens does not fit .* holds 1000"),
        (Request(0.0, "m0", 0, 2), "at least 1 token"),
        (Request(-1.0, "m0", 1, 2), "out of order"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    simulation = Simulation([model("m0", kv_bytes_per_token=10**6)], [SMALL], "slack")
    with pytest.raises(ConfigError, match=message):
        simulation.run([request_])


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match="unknown policy 'x'; expected one of: fcfs, paper"):
        Simulation([model("m0")], [SMALL], "x")


def test_static_runs_what_fits_and_refuses_the_rest():
    models = [model(f"m{i}", 5.0) for i in range(4)]
    requests = [Request(float(i), f"m{i}", 10, 10) for i in range(4)]
    result = Simulation(models, [SMALL], "static").run(requests)
    assert result.attainment.num_refused == 2


def test_placement_spreads_load_and_copies_what_is_asked_most():
    models = [model(f"m{i}", 5.0) for i in range(3)]
    placed = place(models, {"m0": 4.0, "m1": 1.0, "m2": 1.0}, 2, 12 * GB)
    assert [[each.name for each in at] for at in placed] == [["m0", "m1"], ["m1", "m2"]]
    placed = place(models, {"m0": 4.0, "m1": 1.0, "m2": 1.0}, 2, 18 * GB)
    assert all("m0" in [each.name for each in at] for at in placed)
    assert place(models, dict.fromkeys(["m0", "m1", "m2"], 1.0), 1, 12 * GB) == [models[:2]]


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_every_shape_has_a_profile_on_every_gpu(shape, gpu):
    profile = profile_of(Model.of("m", shape), GPUS[gpu])
    assert 0.001 < profile.step_s < 0.5
    assert 0 < profile.prefill_per_token_s < 0.01
    halved = profile_of(Model.of("m", shape, tp=2), GPUS[gpu])
    assert halved.step_s <= profile.step_s * 1.01


def test_separate_phases_hand_requests_over():
    models = [model(f"m{i}", kv_bytes_per_token=10**5) for i in range(3)]
    requests = random_requests(random.Random(1), 3, 30, within_s=10.0)
    group: GpuGroup = replace(SMALL, instances=3, num_prefill=1)
    result = Simulation(models, [group], "paper").run(requests)
    prefill, *decode = (totals for _, totals in result.instances)
    assert prefill.decode_s == 0
    assert prefill.prefill_s > 0
    assert all(totals.prefill_s == 0 and totals.decode_s > 0 for totals in decode)


def test_a_model_waits_for_room_and_starts_with_all_its_requests():
    """Two GPUs keep two models up; the third starts where one has ended, as one batch."""
    slow = Profile(0.09, 0.0, 0.0, 0.01, 0.0)
    models = [model(f"m{i}", 14.0, profile=slow) for i in range(3)]
    requests = [
        Request(0.0, "m0", 10, 20),
        Request(0.1, "m1", 10, 200),
        Request(0.2, "m2", 10, 10),
        Request(0.3, "m2", 10, 10),
    ]
    times = token_times(models, [SMALL.sized(2)], "slack", requests)
    assert times[2] == times[3]
    assert times[0][-1] < times[2][0] < times[0][-1] + 2.0
    assert max(b - a for a, b in zip(times[1], times[1][1:], strict=False)) < 0.1


def test_a_model_that_has_waited_long_shares_an_instance():
    slow = Profile(0.09, 0.0, 0.0, 0.01, 0.0)
    models = [model(f"m{i}", 14.0, profile=slow) for i in range(2)]
    requests = [Request(0.0, "m0", 10, 2000), Request(0.1, "m1", 10, 10)]
    times = token_times(models, [SMALL.sized(2)], "slack", [*requests, Request(0.2, "m0", 10, 5)])
    assert times[1][0] < 5.0
    three = [*models, model("m2", 14.0, profile=slow)]
    late = token_times(
        three,
        [SMALL.sized(2)],
        "slack",
        [requests[0], Request(0.1, "m1", 10, 2000), Request(0.2, "m2", 10, 10)],
    )
    assert MOST_WAIT_S < late[2][0] < MOST_WAIT_S + 30.0
