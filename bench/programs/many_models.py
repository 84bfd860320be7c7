"""Many tiny models in one instance: what each of them costs, and that all of them are exact.

Reads a job from standard input: `checkpoints` (paths; names are made up), `count`, `device_memory`,
`kv_memory`, `max_model_len`, `prompts`, `max_tokens`. The last line of standard output is the
answer: per model seconds to add it and bytes of host memory beside its image; `exact`: models of
one checkpoint all say the same, in two rounds, switched after every step.
"""

import gc
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

import aegaeon_kernels as ak
from aegaeon.core import envs
from aegaeon.core.config import ModelConfig
from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.switching.residency import WeightsUnit

envs.set_vllm_defaults()

from aegaeon.vllm_plugin.offline import OfflinePool, Prompt  # noqa: E402 - imports vLLM


@dataclass
class Costs:
    seconds: list[float] = field(default_factory=list)
    host_bytes: list[int] = field(default_factory=list)


def held_bytes(pool: OfflinePool) -> int:
    """Of this process, without weights images and without what is on the device."""
    gc.collect()
    images = sum(
        unit.image.size_bytes
        for memory in pool.switcher.models.values()
        for unit in memory.units
        if isinstance(unit, WeightsUnit)
    )
    memory = psutil.Process().memory_full_info()
    on_device: int = memory.shared
    rss: int = memory.rss
    return rss - on_device - images


def add_all(pool: OfflinePool, job: dict[str, Any]) -> tuple[dict[str, str], Costs]:
    costs, checkpoint_of = Costs(), {}
    for number in range(job["count"]):
        path = job["checkpoints"][number % len(job["checkpoints"])]
        name = f"model-{number}"
        before = held_bytes(pool)
        started = time.perf_counter()
        pool.add_model(
            ModelConfig(
                model=path,
                name=name,
                kv_memory=job["kv_memory"],
                max_model_len=job["max_model_len"],
                vllm={"enable_prefix_caching": False},
            )
        )
        costs.seconds.append(time.perf_counter() - started)
        costs.host_bytes.append(held_bytes(pool) - before)
        checkpoint_of[name] = path
    return checkpoint_of, costs


def main() -> None:
    job = json.load(sys.stdin)
    sampling = {"max_tokens": job["max_tokens"], "temperature": 0.0, "ignore_eos": True}
    device = ak.Device("host", memory_bytes=job["device_memory"])
    with OfflinePool(
        device, device_memory_bytes=job["device_memory"], policy=RoundRobin(quantum=1)
    ) as pool:
        checkpoint_of, costs = add_all(pool, job)
        prompts = [
            Prompt(name, text, sampling) for text in job["prompts"] for name in checkpoint_of
        ]
        said: dict[str, set[tuple[int, ...]]] = {}
        for _ in range(2):
            for prompt, output in zip(prompts, pool.generate(prompts), strict=True):
                tokens = tuple(output.outputs[0].token_ids)
                said.setdefault(f"{checkpoint_of[prompt.model]} {prompt.prompt}", set()).add(tokens)
        totals = pool.switcher.totals
    answer = {
        "exact": all(len(tokens) == 1 for tokens in said.values()),
        "different": len({min(tokens) for tokens in said.values()}),
        "expected": len(said),
        "add_s": costs.seconds,
        "host_bytes": costs.host_bytes,
        "warm": totals.warm,
        "hot": totals.hot,
    }
    sys.stdout.flush()
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
