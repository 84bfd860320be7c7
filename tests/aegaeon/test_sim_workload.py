"""Workloads: their rates and lengths, their files, and what is said about bad ones."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from aegaeon.cli import app
from aegaeon.core.errors import ConfigError
from aegaeon.sim.config import load_workload
from aegaeon.sim.presets import PRESETS, preset
from aegaeon.sim.simulator import Request
from aegaeon.sim.traces import read_trace, write_trace
from aegaeon.sim.workload import (
    LENGTHS,
    Beat,
    Diurnal,
    Gamma,
    GroupBurst,
    OnOff,
    Poisson,
    zipf_rates,
)

PROCESSES = {
    "poisson": (Poisson(), 1.0),
    "gamma": (Gamma(4.0), 4.0),
    "on-off": (OnOff(20.0, 60.0), None),
    "diurnal": (Diurnal(500.0, 0.8), None),
    "group-burst": (GroupBurst("g", 20.0, 100.0, 4.0), None),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_has_its_rate_and_its_spread(name):
    process, spread = PROCESSES[name]
    times = list(process.times(Random(1), 2.0, 20_000.0))
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 20_000
    assert len(times) == pytest.approx(40_000, rel=0.07)
    if spread is not None:
        gaps = [b - a for a, b in pairwise(times)]
        assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(spread, rel=0.1)


def test_models_of_a_group_are_busy_together():
    burst = GroupBurst("g", 20.0, 200.0, 8.0)
    counts = []
    for seed in (1, 2):
        per_window = [0] * 200
        for time in burst.times(Random(seed), 2.0, 4000.0):
            per_window[int(time / 20)] += 1
        counts.append(per_window)
    assert statistics.correlation(*counts) > 0.5


def test_a_beat_repeats():
    assert list(Beat(10.0, (0.0, 4.0)).times(Random(0), 0.0, 21.0)) == [0.0, 4.0, 10.0, 14.0, 20.0]


@pytest.mark.parametrize(
    ("name", "input_90", "output_90"), [("code", 5187, 55), ("conversation", 2734, 424)]
)
def test_lengths_meet_the_published_quantiles_roughly(name, input_90, output_90):
    dice = Random(2)
    drawn = [LENGTHS[name].draw(dice) for _ in range(20_000)]
    for place, published in ((0, input_90), (1, output_90)):
        ordered = sorted(pair[place] for pair in drawn)
        assert ordered[len(ordered) * 9 // 10] == pytest.approx(published, rel=0.3)


def test_stretched_lengths_are_longer():
    longer = LENGTHS["chat"].stretched(output=2.0)
    ours = [LENGTHS["chat"].draw(Random(i))[1] for i in range(500)]
    theirs = [longer.draw(Random(i))[1] for i in range(500)]
    assert statistics.mean(theirs) == pytest.approx(2 * statistics.mean(ours), rel=0.02)


def test_zipf_rates_add_up():
    rates = zipf_rates(5, 10.0, 0.9)
    assert sum(rates) == pytest.approx(10.0)
    assert rates[0] / rates[1] == pytest.approx(2**0.9)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_again_and_another_with_another_seed(name):
    scenario = preset(name)
    requests = scenario.requests(1)
    assert requests == preset(name).requests(1)
    assert requests != scenario.requests(2)
    assert requests == sorted(requests)
    assert len(requests) > 50


def test_the_production_fleet_is_the_published_one():
    loads = preset("production-47").loads
    assert [sum(load.model.tp == tp for load in loads) for tp in (1, 4)] == [28, 19]
    assert statistics.mean(load.rate for load in loads) == pytest.approx(0.037)
    assert min(load.rate for load in loads) == pytest.approx(0.01)
    assert max(load.rate for load in loads) == 1.13


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown preset 'x'; expected one of: aegaeon-0\.1, "):
        preset("x")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_trace_survives_its_file(tmp_path: Path, ending):
    requests = [Request(0.125, "a,b", 10, 3), Request(7.5, "ü", 1, 2048)]
    path = tmp_path / f"trace.{ending}"
    write_trace(path, requests)
    assert read_trace(path) == requests


def test_rows_as_load_generators_write_them_are_read(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": 1500, "model": "a", "input_length": 7, "output_length": 2, "hash_ids": [1]},
        {"timestamp": 0, "input_length": 3, "payload": {"model": "b", "max_tokens": 9}},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_trace(path) == [Request(0.0, "b", 3, 9), Request(1.5, "a", 7, 2)]


CSV = "Request Time,Model Name,Input Length,Output Length\n"
BAD = {
    "time.csv": (CSV + "0,a,1,1\nsoon,a,1,1\n", r"time\.csv:3: Request Time: got 'soon'; expected"),
    "tokens.csv": (CSV + "0,a,1.5,1\n", r":2: Input Length: got '1\.5'; expected a whole number"),
    "none.csv": (CSV + "0,a,1,0\n", r":2: Output Length: got '0'; expected .* at least 1"),
    "model.csv": (CSV + "0,,1,1\n", r":2: Model Name: got ''; expected the name"),
    "short.csv": (CSV + "0,a,1\n", ":2: got 3 values; expected 4"),
    "header.csv": ("time,model\n0,a\n", ":1: got the columns time, model; expected .* missing"),
    "nan.csv": (CSV + "nan,a,1,1\n", ":2: Request Time: got 'nan'"),
    "empty.csv": (CSV, "no requests"),
    "json.jsonl": ('{"model": "a"}\n{', r"json\.jsonl:1: timestamp: got nothing"),
    "cut.jsonl": ('{"timestamp": ', "cut.jsonl:1: not JSON"),
    "list.jsonl": ("[1]", r":1: got \[1\]; expected an object"),
    "t.txt": ("", "expected a file that ends in"),
    "x.csv": (None, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_trace_is_named_by_file_and_line(tmp_path: Path, name):
    text, message = BAD[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / name)


WORKLOAD = """
gpus:
  - {gpu: H800, count: 2}
models:
  - {name: chat, count: 3, shape: Qwen2.5-7B, rate: 0.2, zipf: 0.9}
  - name: own
    weights: 10GB
    kv_bytes_per_token: 1000
    kv_memory: 4GB
    profile: {step_s: 0.01}
    arrivals: {process: gamma, cv: 3.0}
    lengths: {input: {median: 100}, output: {median: 20, sigma: 0.5}}
duration: 1m
policy: request-level
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "workload.yaml"
    path.write_text(text)
    return path


def test_a_workload_file_becomes_a_scenario(tmp_path: Path):
    scenario, settings = load_workload(written(tmp_path, WORKLOAD))
    assert [each.name for each in scenario.models] == ["chat-0", "chat-1", "chat-2", "own"]
    assert math.fsum(load.rate for load in scenario.loads[:3]) == pytest.approx(0.6)
    assert scenario.duration_s == 60
    assert settings.policy == "request-level"
    assert all(
        request.input_tokens == 100 for request in scenario.requests(0) if request[1] == "own"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpu: H800", "gpu: H8000", r"workload\.yaml:3: gpus\[0\]\.gpu: got 'H8000'; .*H800"),
        ("Qwen2.5-7B", "Qwen", r":5: models\[0\]\.shape: got 'Qwen'; expected one of: Qwen2"),
        ("process: gamma", "process: gama", r":11: .*process.*gama"),
        ("duration", "durations", "unknown key; did you mean 'duration'"),
        ("request-level", "fifo", ":14: policy: got 'fifo'; expected one of: fcfs"),
        ("weights: 10GB", "weights: 90GB", r"'own' needs 90\.0 GB .* 1 x H800 have 72\.0 GB"),
        ("    weights: 10GB\n", "", r":6: models\[1\]: expected a `shape`, or also weights"),
        ("count: 2}", "count: 2, tp: 4}", r"gpus\[0\]: expected a `count` that is a multiple"),
        ("name: own", "name: chat-1", "several models are called chat-1"),
    ],
)  # fmt: skip
def test_a_bad_workload_file_is_named_by_line_and_key(tmp_path: Path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        load_workload(written(tmp_path, WORKLOAD.replace(old, new, 1)))


def test_a_trace_replaces_generated_requests_and_may_only_ask_for_known_models(tmp_path: Path):
    write_trace(tmp_path / "t.csv", [Request(1.0, "own", 5, 5)])
    scenario, _ = load_workload(written(tmp_path, WORKLOAD + "trace: t.csv\n"))
    assert scenario.requests(0) == scenario.requests(1) == [Request(1.0, "own", 5, 5)]
    write_trace(tmp_path / "t.csv", [Request(1.0, "other", 5, 5)])
    with pytest.raises(ConfigError, match=r"asks for models that .* lacks: other"):
        load_workload(written(tmp_path, WORKLOAD + "trace: t.csv\n"))


def test_the_command_simulates_prints_and_writes(tmp_path: Path):
    run = CliRunner().invoke
    path = written(tmp_path, WORKLOAD)
    shown = run(app, ["sim", str(path), "--write", str(tmp_path / "t.jsonl")])
    assert shown.exit_code == 0
    assert "requests with 99 % of tokens on time" in shown.output
    assert len(read_trace(tmp_path / "t.jsonl")) > 20
    lines = run(app, ["sim", "--preset", "pingpong", "--policy", "fcfs", "--policy", "slack",
                      "--slo-scale", "0.5", "--json"]).output.splitlines()  # fmt: skip
    first, second = map(json.loads, lines)
    assert (first["policy"], second["policy"]) == ("fcfs", "slack")
    assert first["simulated"] is True
    assert first["num_requests"] == second["num_requests"] == 80
    assert sum(first["gpu_time"].values()) == pytest.approx(1)
    assert isinstance(run(app, ["sim"]).exception, ConfigError)
