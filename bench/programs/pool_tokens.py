"""All models of a pool answer the same requests, switched after every step; reports the tokens.

Reads a job from standard input: `device`, `device_memory`, `models` (name -> checkpoint),
`kv_memory`, `max_model_len`, `vllm` (options of every model), `requests` (see `request_form`). The
last line of standard output is the answer.
"""

import json
import sys
from typing import Any

import aegaeon_kernels as ak
from aegaeon.core import envs
from aegaeon.core.config import ModelConfig
from aegaeon.sched.policies.round_robin import RoundRobin

envs.set_vllm_defaults()

from aegaeon.vllm_plugin.offline import OfflinePool, Prompt  # noqa: E402 - imports vLLM


def main() -> None:
    job = json.load(sys.stdin)
    size = {"memory_bytes": job["device_memory"]} if job["device"] == "host" else {}
    token_ids: dict[str, list[Any]] = {name: [] for name in job["models"]}
    with OfflinePool(
        ak.Device(job["device"], **size),
        device_memory_bytes=job["device_memory"],
        policy=RoundRobin(quantum=1),
    ) as pool:
        for name, path in job["models"].items():
            pool.add_model(
                ModelConfig(
                    model=path,
                    name=name,
                    kv_memory=job["kv_memory"],
                    max_model_len=job["max_model_len"],
                    vllm=job["vllm"],
                )
            )
        prompts = [Prompt(name, **each) for each in job["requests"] for name in job["models"]]
        for prompt, output in zip(prompts, pool.generate(prompts), strict=True):
            token_ids[prompt.model].append(list(output.outputs[0].token_ids))
        switches = pool.switcher.totals.warm
    sys.stdout.flush()
    print(json.dumps({"token_ids": token_ids, "switches": switches}), flush=True)


if __name__ == "__main__":
    main()
