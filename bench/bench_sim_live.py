"""Does the simulator say what the live instance does?

    pytest bench/bench_sim_live.py        (with --keep-results the figures go to results/)

A server with three models, of which the device holds one, is sent the same requests twice. In the
first pass it learns what its steps, prompts and switches take, in the second one it is compared:
the simulator gets the same requests, these costs, and the same policy. Goal: tokens and requests on
time within 5 points, the number of switches within 10 %.

What cannot agree: the simulated front costs nothing, and the real costs differ from step to step.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import KV_MEMORY, MAX_MODEL_LEN, room_for_one

from aegaeon import bench_report, bench_serve
from aegaeon.core import envs
from aegaeon.core.slo import TokenDeadlines
from aegaeon.local_server import LocalServer, local_server
from aegaeon.sched.cost import Profile
from aegaeon.sim.hardware import Gpu, GpuGroup, Model
from aegaeon.sim.simulator import Request, Result, Simulation
from aegaeon.sim.workload import Lengths, Poisson, Tokens
from aegaeon.tiny_model import write_tiny_model

pytestmark = pytest.mark.timeout(900)

POLICY = "slack"
DEADLINES = TokenDeadlines(ttft_s=0.4, tpot_s=0.06)
LENGTHS = Lengths(Tokens(80, 0.5, 8, 300), Tokens(40, 0.5, 4, 150))
DURATION_S = 60.0
# Never the limit: what steps take is measured.
ENDLESS = 1e18


def serve(models: dict[str, Path], folder: Path) -> Path:
    pool = {
        "device": "host",
        "device_memory": room_for_one(models),
        "defaults": {
            "kv_memory": KV_MEMORY,
            "max_model_len": MAX_MODEL_LEN,
            "slo": {"ttft_ms": DEADLINES.ttft_s * 1e3, "tpot_ms": DEADLINES.tpot_s * 1e3},
        },
        "models": [
            {"model": str(path), "name": name, "vllm": {"enable_prefix_caching": False}}
            for name, path in models.items()
        ],
        "scheduler": {"policy": POLICY},
        "admin": {"socket": str(folder / "admin.sock")},
    }
    pool_file = folder / "pool.yaml"
    pool_file.write_text(yaml.safe_dump(pool))
    return pool_file


def play(server: LocalServer, requests: list[Request], names: list[str]) -> dict[str, float]:
    """What became of the requests, and of the switches meanwhile."""
    target = bench_serve.Target(server.address)
    served = asyncio.run(bench_serve.served_targets(target, names))
    deadlines = dict.fromkeys(names, DEADLINES)
    before = server.admin("/admin/state")["switches"]["warm"]
    outcomes = asyncio.run(bench_serve.run(target, requests, served, deadlines))
    assert all(outcome.error is None for outcome in outcomes)
    after = server.admin("/admin/state")["switches"]["warm"]
    report = bench_report.summary(outcomes, deadlines, duration_s=DURATION_S)
    attained = report[bench_report.ALL]["attainment"]
    return {
        "tokens": attained["tokens_on_time"],
        "requests": attained["requests_99_percent_on_time"],
        "switches": after - before,
    }


def simulate(requests: list[Request], state: dict[str, Any]) -> dict[str, float]:
    costs = state["costs"]
    models = []
    for model in state["models"]:
        sizes = {unit["tag"]: unit["size_bytes"] for unit in model["units"]}
        models.append(
            Model(
                model["name"],
                weights_bytes=sizes["weights"],
                kv_bytes_per_token=sizes["kv"] // (2 * MAX_MODEL_LEN),
                kv_memory_bytes=sizes["kv"],
                deadlines=DEADLINES,
                profile=Profile(**costs["profiles"][model["name"]]),
            )
        )
    capacity = state["arena"]["capacity_bytes"]
    device = Gpu("this machine", capacity, costs["link_bytes_per_s"], ENDLESS)
    group = GpuGroup(device, 1, memory_share=1.0, link_share=1.0, switch_s=costs["switch_s0"])
    result: Result = Simulation(models, [group], POLICY).run(requests)
    switches = result.switches()
    return {
        "tokens": result.attainment.tokens,
        "requests": result.attainment.requests,
        "switches": switches["warm"] + switches["ahead"],
    }


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_the_same_requests_live_and_simulated(tmp_path, record, rate):
    models = {
        arch: write_tiny_model(arch, tmp_path / arch, size="small", seed=seed)
        for seed, arch in enumerate(("llama", "qwen3", "gemma"))
    }
    requests = bench_serve.workload(
        dict.fromkeys(models, rate),
        arrivals=Poisson(),
        lengths=LENGTHS,
        duration_s=DURATION_S,
        seed=7,
    )
    envs.set_vllm_defaults()
    with local_server(serve(models, tmp_path), log=tmp_path / "log") as server:
        play(server, requests, list(models))
        live = play(server, requests, list(models))
        state = server.admin("/admin/state")
    simulated = simulate(requests, state)
    record(
        f"{POLICY}, {rate:g} requests/s of each of 3 models",
        None,
        num_requests=len(requests),
        **{f"live_{key}": value for key, value in live.items()},
        **{f"simulated_{key}": value for key, value in simulated.items()},
        costs=json.dumps(state["costs"]),
    )
