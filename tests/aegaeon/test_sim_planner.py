"""Studies, plans and reports over the simulator."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sim_support import SMALL, model
from typer.testing import CliRunner

from aegaeon.cli import app
from aegaeon.core.config import load_pool
from aegaeon.core.errors import CapacityError, ConfigError, ModelLoadError
from aegaeon.core.slo import TokenDeadlines
from aegaeon.sim import results
from aegaeon.sim.planner import parts, plan_dedicated, plan_pool
from aegaeon.sim.presets import preset
from aegaeon.sim.report import write_report
from aegaeon.sim.simulator import Request, Simulation
from aegaeon.sim.study import Run, interval, simulate, simulate_all
from aegaeon.sim.summary import summary
from aegaeon.sim.traces import write_trace
from aegaeon.sim.workload import Load, Scenario
from aegaeon.sim_pool import scenario_of


def three_large(**given: object) -> Scenario:
    """Three models, each of which fills a GPU."""
    loads = tuple(Load(model(f"m{i}", 14.0, **given), 0.05) for i in range(3))
    return Scenario("three", loads, (SMALL,), duration_s=200.0)


def test_a_placed_pool_needs_room_for_every_model():
    plan = plan_pool(three_large(), "static", level=0.99)
    (part,) = plan.groups
    assert (plan.num_gpus, part.limits) == (3, ("memory",))
    assert part.attained >= 0.99 > part.with_one_fewer
    assert plan_dedicated(three_large(), level=0.99) == 3
    assert plan_pool(three_large(), "slack", level=0.99).num_gpus < 3


def test_the_fewest_is_the_fewest():
    scenario = preset("cold-long-tail").lasting(60.0)
    (part,) = plan_pool(scenario, "request-level").groups
    for instances, meets in ((part.group.instances, True), (part.group.instances - 1, False)):
        if instances:
            sized = scenario.on([scenario.groups[0].sized(instances)])
            assert (simulate(Run(sized, "request-level")).tokens >= 0.9) is meets


def test_objectives_that_no_number_of_gpus_meets_are_said_to_be_so(monkeypatch):
    monkeypatch.setattr("aegaeon.sim.planner.MOST_INSTANCES", 8)
    with pytest.raises(CapacityError, match="miss their objectives with 8 instances too"):
        plan_pool(three_large(deadlines=TokenDeadlines(0.001, 0.001)), "slack")


def test_groups_are_planned_one_by_one_and_traces_go_with_their_models():
    small, large = parts(preset("production-47"))
    assert (len(small.loads), len(large.loads)) == (28, 19)
    loads = (Load(model("a"), 1.0), Load(model("b", tp=2), 1.0))
    trace = (Request(0.0, "a", 1, 1), Request(1.0, "b", 1, 1), Request(2.0, "a", 1, 1))
    scenario = Scenario("t", loads, (SMALL, replace(SMALL, tp=2)), trace=trace)
    assert [len(part.requests(0)) for part in parts(scenario)] == [2, 1]


@pytest.mark.parametrize(("number", "student"), [(4, 3.182), (8, 2.365), (20, 2.093)])
def test_intervals_are_those_of_students_distribution(number, student):
    values = [float(i % 2) for i in range(number)]
    mean, half = interval(values)
    spread = (number / 4 / (number - 1)) ** 0.5
    assert mean == 0.5
    assert half == pytest.approx(student * spread / number**0.5, rel=0.01)
    assert interval([0.3]) == (0.3, 0.0)


def test_runs_are_the_same_in_other_processes():
    runs = [
        Run(preset("pingpong").lasting(60.0), policy, seed)
        for policy in ("slack", "fcfs")
        for seed in (0, 1)
    ]
    done: list[int] = []
    assert simulate_all(runs, workers=2, on_done=done.append) == [simulate(run) for run in runs]
    assert done == [1, 2, 3, 4]


def test_a_report_is_one_page_with_its_plots(tmp_path: Path):
    scenario = preset("pingpong").lasting(30.0)
    simulation = Simulation(scenario.models, scenario.groups, "slack", keep_spans=True)
    result = simulation.run(scenario.requests(0))
    shown = summary(result, scenario)
    page = write_report(tmp_path, scenario, [shown], {"slack": result.spans}, seeds=(0,), workers=1)
    text = page.read_text()
    assert "<b>Simulated</b>" in text
    assert 'src="http' not in text
    plots = ["models-per-gpu", "rate", "slo-scale", "timeline-slack"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == plots
    assert text.count("data:image/png;base64,") == 4
    assert json.loads((tmp_path / "summary.json").read_text()) == [shown]


def test_spans_cover_the_busy_time_and_do_not_overlap():
    scenario = preset("cold-long-tail").lasting(60.0)
    simulation = Simulation(scenario.models, scenario.groups, "slack", keep_spans=True)
    result = simulation.run(scenario.requests(0))
    for number, (_, totals) in enumerate(result.instances):
        spans = sorted(
            (span.start_s, span.end_s) for span in result.spans if span.instance == number
        )
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
        assert sum(end - start for start, end in spans) == pytest.approx(totals.busy_s)


def test_the_document_of_results_is_written_with_its_plots(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(results, "MODELS", {0.1: (4, 8), 0.5: (4, 8)})
    monkeypatch.setattr(results, "STRICT_MODELS", (4, 64))
    monkeypatch.setattr(results, "SWITCH_MODELS", (4, 64))
    monkeypatch.setattr(results, "SWITCH_S", (0.0, 27.0))
    monkeypatch.setattr(results, "RATES", (0.1, 0.2))
    monkeypatch.setattr(results, "PRESETS", {"pingpong": preset})
    monkeypatch.setattr(results, "FLEET_S", 20.0)
    results.main(
        [str(tmp_path / "r.md"), "--seeds", "2", "--sweep-seeds", "1", "--workers", "1",
         "--duration", "8"]
    )  # fmt: skip
    text = (tmp_path / "r.md").read_text()
    assert "**Everything here is simulated" in text
    for path in (tmp_path / "r").glob("*.png"):
        assert f"![{path.stem}](r/{path.name})" in text
    assert len(list((tmp_path / "r").glob("*.png"))) == 5


def test_the_command_plans_and_says_what_it_needs(tmp_path: Path):
    run = CliRunner().invoke
    path = tmp_path / "pool.yaml"
    path.write_text(
        "gpus: [{gpu: H800, count: 1}]\nmodels: [{name: m, count: 3, shape: Qwen2.5-7B}]\n"
    )
    write_trace(tmp_path / "t.csv", [Request(float(i), f"m-{i % 3}", 50, 50) for i in range(30)])
    given = ["plan", str(path), "--workload", str(tmp_path / "t.csv"), "--level", "0.99"]
    told = json.loads(run(app, [*given, "--json"]).output)
    by_policy = {each["policy"]: each["num_gpus"] for each in told["plans"]}
    assert by_policy == {
        "dedicated": 3, "slack": 1, "paper": 1, "request-level": 1, "static": 2,
    }  # fmt: skip
    assert "fewest GPUs for 3 models" in run(app, [*given, "--policy", "fcfs"]).output
    for wrong in (["plan"], [*given[:2], "--workload", "x"], [*given, "--metric", "x"],
                  [*given, "--policy", "x"]):  # fmt: skip
        assert isinstance(run(app, wrong).exception, ConfigError)


def checkpoint(path: Path, **settings: int) -> None:
    """What is read of one: sizes and shapes, no more."""
    path.mkdir()
    save_file({"w": np.zeros(3_000_000, np.float16)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings))


def test_a_servers_pool_file_is_planned_by_its_checkpoints(tmp_path: Path):
    checkpoint(tmp_path / "a", num_hidden_layers=4, hidden_size=64, num_attention_heads=8)
    checkpoint(
        tmp_path / "b", num_hidden_layers=4, num_attention_heads=8, head_dim=16,
        num_key_value_heads=2,
    )  # fmt: skip
    path = tmp_path / "pool.yaml"
    path.write_text(
        "device_memory: 20GiB\nmodels:\n  - {model: a, kv_memory: 1GiB, slo: {ttft_ms: 500}}\n"
        "  - {model: b, vllm: {tensor_parallel_size: 2}}\n"
    )
    scenario = scenario_of(load_pool(path), "pool", gpu="H100", rate=0.1)
    first, second = scenario.models
    assert first.weights_bytes == second.weights_bytes == 6_000_000
    assert first.kv_bytes_per_token == 2 * 2 * 4 * 8 * 8
    assert second.kv_bytes_per_token == 2 * 2 * 4 * 2 * 16
    assert (first.deadlines.ttft_s, second.tp) == (0.5, 2)
    assert [group.capacity_bytes >> 30 for group in scenario.groups] == [20, 40]
    run = CliRunner().invoke
    told = json.loads(run(app, ["plan", str(path), "--policy", "slack", "--json"]).output)
    assert [each["num_gpus"] for each in told["plans"]] == [3, 3]
    assert isinstance(run(app, ["plan", str(path), "--gpu", "x"]).exception, ConfigError)
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="does not tell its KV size"):
        scenario_of(load_pool(path), "pool", gpu="H100", rate=0.5)
