"""What the example programs of the end-to-end tests share. Each runs in a process of its own."""

import json
import sys
from pathlib import Path
from typing import Any

import aegaeon_kernels as ak
from aegaeon.core import envs
from aegaeon.core.config import ModelConfig
from aegaeon.sched.policies import make_policy
from aegaeon.switching.image_cache import ImageCache

envs.set_vllm_defaults()

from aegaeon.vllm_plugin.offline import OfflinePool, Prompt  # noqa: E402 - imports vLLM


def read_job() -> dict[str, Any]:
    job: dict[str, Any] = json.load(sys.stdin)
    return job


def report(answer: dict[str, Any]) -> None:
    """The program's answer: the last line of its standard output."""
    sys.stdout.flush()
    print(json.dumps(answer), flush=True)


def make_pool(job: dict[str, Any], device: ak.Device | None = None) -> OfflinePool:
    """A pool with all models of the job loaded.

    Job: `device_memory` (bytes), `quantum`, `policy`, `models`: name -> checkpoint, `kv_memory`,
    `max_model_len`, `vllm` (engine options of every model), `vllm_of` (more, by name of the model),
    `image_cache` (a directory).
    """
    pool = OfflinePool(
        device or ak.Device("host", memory_bytes=job["device_memory"]),
        device_memory_bytes=job["device_memory"],
        policy=make_policy(job.get("policy", "round-robin"), quantum=job["quantum"]),
        image_cache=ImageCache(Path(cache), 1 << 40) if (cache := job.get("image_cache")) else None,
    )
    for name, path in job["models"].items():
        pool.add_model(model_config(job, name, path))
    return pool


def model_config(job: dict[str, Any], name: str, path: str) -> ModelConfig:
    return ModelConfig(
        model=path,
        name=name,
        kv_memory=job["kv_memory"],
        max_model_len=job["max_model_len"],
        vllm={**job.get("vllm", {}), **job.get("vllm_of", {}).get(name, {})},
    )


def prompts_of(job: dict[str, Any]) -> list[Prompt]:
    """The job's `requests`: model name -> list of requests; models interleaved."""
    return [
        Prompt(model=name, **{"sampling": None, **request})
        for name, requests in job["requests"].items()
        for request in requests
    ]


def token_ids_by_model(prompts: list[Prompt], outputs: list[Any]) -> dict[str, list[list[int]]]:
    answers: dict[str, list[list[int]]] = {}
    for prompt, output in zip(prompts, outputs, strict=True):
        answers.setdefault(prompt.model, []).append(list(output.outputs[0].token_ids))
    return answers
