"""How long until a model answers that is not running, by where it is? And what does the Nth cost?

    pytest bench/bench_models.py          (with --keep-results the figures go to results/)

Limit: the bytes that have to move, at the rate of memory; see bench_switch.py for a switch alone.
What is compared is what a user would wait for: from the moment that the model is wanted to its
first token. The baseline, vLLM started anew with the other model, runs in the same test. Goals:
a 2nd to Nth tiny model takes under 0.5 s and under 8 MiB of host memory beside its image.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from load import prompts
from measure import quantiles
from servers import KV_MEMORY, MAX_MODEL_LEN, room_for_one

from aegaeon.tiny_model import write_tiny_model
from aegaeon.vllm_plugin.plain import run_alone

pytestmark = pytest.mark.timeout(1800)

PROGRAMS = Path(__file__).parent / "programs"
MIB = 1 << 20


def run(program: str, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / f"{program}.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_paths_to_the_first_token(tmp_path, record):
    """Two models of 85 MiB on a device that holds both."""
    models = {
        arch: write_tiny_model(arch, tmp_path / arch, size="small", seed=seed)
        for seed, arch in enumerate(("llama", "qwen3"))
    }
    text = prompts(1)[0]
    job = {
        "models": {name: str(path) for name, path in models.items()},
        "device_memory": 2 * room_for_one(models),
        "kv_memory": KV_MEMORY,
        "max_model_len": MAX_MODEL_LEN,
        "prompt": text,
        "rounds": 20,
        "load_rounds": 5,
        "image_cache": str(tmp_path / "images"),
    }
    answer = run("switch_paths", job)
    assert answer["exact"]
    restart = []
    for path in (*models.values(), *models.values())[:3]:
        started = time.monotonic()
        request = {"prompt": text, "sampling": {"max_tokens": 1, "temperature": 0.0}}
        engine = {"enable_prefix_caching": False}
        run_alone(
            [
                {
                    "model": str(path),
                    "max_model_len": MAX_MODEL_LEN,
                    "kv_memory": KV_MEMORY,
                    "engine": engine,
                    "requests": [request],
                }
            ]
        )
        restart.append(time.monotonic() - started)
    for path_name, rounds in answer["seconds"].items():
        figures = quantiles("first_token_ms", [total for total, _ in rounds])
        figures |= quantiles("of_which_switch_or_load_ms", [part for _, part in rounds])
        figures["rounds"] = len(rounds)
        record(f"first token: {path_name}", None, **figures)
    record(
        "first token: vLLM started anew",
        None,
        first_token_ms_p50=statistics.median(restart) * 1e3,
        rounds=len(restart),
    )


@pytest.mark.parametrize("count", [50])
def test_many_models(count, tmp_path, record):
    """Four checkpoints of 5 to 7 MiB under `count` names, on a device that holds three of them."""
    checkpoints = {
        arch: write_tiny_model(arch, tmp_path / arch, seed=seed)
        for seed, arch in enumerate(("llama", "qwen2", "qwen3", "mistral"))
    }
    kv_memory = 4 * MIB
    job = {
        "checkpoints": [str(path) for path in checkpoints.values()],
        "count": count,
        "device_memory": 3 * (room_for_one(checkpoints) - KV_MEMORY + kv_memory),
        "kv_memory": kv_memory,
        "max_model_len": 512,
        "prompts": prompts(2),
        "max_tokens": 8,
    }
    answer = run("many_models", job)
    assert answer["exact"]
    assert answer["different"] == answer["expected"]
    later = len(checkpoints)  # from here on no architecture is new to the process
    figures: dict[str, Any] = {"models": count, "first_add_s": answer["add_s"][0]}
    figures |= quantiles("add_ms", answer["add_s"][later:])
    figures["last_ten_add_ms_p50"] = statistics.median(answer["add_s"][-10:]) * 1e3
    figures["host_mib_beside_image_mean"] = statistics.mean(answer["host_bytes"][later:]) / MIB
    figures["host_mib_beside_image_max"] = max(answer["host_bytes"][later:]) / MIB
    figures["warm_switches"] = answer["warm"]
    record(f"{count} tiny models in one instance", None, **figures)
