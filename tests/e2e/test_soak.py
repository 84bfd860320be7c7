"""Eight models under random load, eviction and order, against each of them alone.

The short form is part of `make test`. `make soak` runs the long one, of SOAK_REQUESTS requests per
model (80 by default), and its negative controls.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e_support import KV_MEMORY, PROGRAMS, job_for
from soak_support import script

from aegaeon.core import envs

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(0)]

ARCHITECTURES = (
    "llama",
    "mistral_window",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma3",
    "smollm",
)
MANY_MODELS = Path(__file__).parents[2] / "bench" / "programs" / "many_models.py"
# Prompts of up to 400 tokens come in chunks.
ENGINE = {"max_num_batched_tokens": 192, "max_num_seqs": 8}


def soak_job(models: dict[str, str], *, seed: int, num_requests: int) -> dict[str, Any]:
    """Device memory for two models, so that switches are warm, hot and in between."""
    scripts = {name: script(name, seed=seed, num_requests=num_requests) for name in models}
    job = job_for(models, {}, scripts=scripts, seed=seed, vllm=ENGINE, max_model_len=1024)
    job["device_memory"] *= 2
    return job


def both(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers of the pool, and of the models alone; at the same time."""
    poison = envs.child_environment({"AEGAEON_POISON_MEMORY": "1"})
    alone = envs.child_environment({"AEGAEON_ENABLE": None, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    running = [
        subprocess.Popen(
            [sys.executable, str(PROGRAMS / f"{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, environment in (("soak", poison), ("soak_alone", alone))
    ]
    results = []
    try:
        for process in running:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            process.stdin = None
        for process in running:
            out, err = process.communicate()
            assert process.returncode == 0, err[-6000:]
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return results[0], results[1]


def differences(ours: dict[str, Any], alone: dict[str, Any]) -> list[str]:
    return [
        request
        for name, answers in alone["answers"].items()
        for request, answer in answers.items()
        if ours["answers"][name].get(request) != answer
    ]


def check(ours: dict[str, Any], alone: dict[str, Any]) -> None:
    assert differences(ours, alone) == []
    assert all(ours["answers"][name].keys() == of.keys() for name, of in alone["answers"].items())
    assert ours["wrong"] == []
    assert ours["failed_models"] == 0
    assert ours["aborted"] > 0
    assert ours["evictions"] > 0
    assert ours["switches"]["warm"] > 5


def test_a_bounded_soak_finds_no_difference(tiny_models):
    models = tiny_models("llama", "mistral_window", "qwen3_moe")
    check(*both(soak_job(models, seed=1, num_requests=10)))


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2])
def test_the_whole_soak_finds_no_difference(seed, tiny_models):
    num_requests = int(os.environ.get("SOAK_REQUESTS", "80"))
    models = tiny_models(*ARCHITECTURES)
    ours, alone = both(soak_job(models, seed=seed, num_requests=num_requests))
    check(ours, alone)
    assert ours["switches"]["hot"] > 0
    assert ours["quanta"] == [1, 2, 3, 5, 8, 32]
    answers = [answer for of in alone["answers"].values() for answer in of.values()]
    counts = {key: ours[key] for key in ("switches", "steps", "evictions", "aborted", "prefetches")}
    print(counts, sum(len(answer["token_ids"]) for answer in answers), "tokens")


@pytest.mark.soak
@pytest.mark.parametrize("what", ["weights", "kv"])
def test_one_flipped_byte_is_found(what, tiny_models):
    job = soak_job(tiny_models("llama", "qwen3"), seed=3, num_requests=12)
    ours, alone = both({**job, "corrupt": what})
    assert differences(ours, alone)


@pytest.mark.soak
def test_fifty_tiny_models_run_and_switch_in_one_instance(tiny_models):
    models = tiny_models("llama", "qwen2", "qwen3", "mistral")
    kv_memory = 4 << 20
    job = {
        "checkpoints": list(models.values()),
        "count": 50,
        "device_memory": 3 * (job_for(models, {})["device_memory"] - KV_MEMORY + kv_memory),
        "kv_memory": kv_memory,
        "max_model_len": 512,
        "prompts": ["Once upon a time", "The ship sails to the island"],
        "max_tokens": 8,
    }
    done = subprocess.run(
        [sys.executable, str(MANY_MODELS)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["exact"]
    assert answer["different"] == answer["expected"] == 8
    assert answer["warm"] > 500
