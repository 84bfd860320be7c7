"""Real models in one process, switched after every token; reports the switches and memmoves.

Reads a job from standard input: `models` (name -> checkpoint), `device_memory`, `kv_memory`,
`max_model_len`, `prompts`, `max_tokens`. The last line of standard output is the answer.
"""

import ctypes
import json
import mmap
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

import aegaeon_kernels as ak
from aegaeon.core import envs
from aegaeon.core.config import ModelConfig
from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.switching.residency import WeightsUnit
from aegaeon.switching.switcher import Switcher, SwitchRecord

envs.set_vllm_defaults()


from aegaeon.vllm_plugin.offline import OfflinePool, Prompt  # noqa: E402 - imports vLLM


class Memmove:
    """After each switch, copies as many bytes as it moved, from the image of who has just left."""

    def __init__(self, switcher: Switcher) -> None:
        self._images = {
            name: unit.image
            for name, memory in switcher.models.items()
            for unit in memory.units
            if isinstance(unit, WeightsUnit)
        }
        size = max(image.size_bytes for image in self._images.values())
        self._memory = mmap.mmap(-1, size)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # the baseline at its best
        self._array = np.frombuffer(self._memory, dtype=np.uint8)
        self._array[:] = 1  # faulted in
        self.seconds: list[float] = []
        self.switches: list[SwitchRecord] = []
        switcher.on_switch = self

    def __call__(self, record: SwitchRecord) -> None:
        self.switches.append(record)
        left = record.bytes_in + record.bytes_out
        image = self._images[record.evicted[0]] if record.evicted else None
        started = time.perf_counter()
        while left and image is not None:
            size = min(left, image.size_bytes)
            ctypes.memmove(self._array.ctypes.data, image.address, size)
            left -= size
        self.seconds.append(time.perf_counter() - started)


def tokens_of(pool: OfflinePool, models: Sequence[str], job: dict[str, Any]) -> dict[str, Any]:
    sampling = {"max_tokens": job["max_tokens"], "temperature": 0.0, "ignore_eos": True}
    prompts = [Prompt(name, text, sampling) for text in job["prompts"] for name in models]
    answers: dict[str, list[list[int]]] = {name: [] for name in models}
    for prompt, output in zip(prompts, pool.generate(prompts), strict=True):
        answers[prompt.model].append(list(output.outputs[0].token_ids))
    return answers


def main() -> None:
    job = json.load(sys.stdin)
    names = list(job["models"])
    device = ak.Device("host", memory_bytes=job["device_memory"])
    with OfflinePool(
        device, device_memory_bytes=job["device_memory"], policy=RoundRobin(quantum=1)
    ) as pool:
        for name, path in job["models"].items():
            pool.add_model(
                ModelConfig(
                    model=path,
                    name=name,
                    kv_memory=job["kv_memory"],
                    max_model_len=job["max_model_len"],
                    vllm={"enable_prefix_caching": False},
                )
            )
        alone: dict[str, Any] = {}
        for name in names:
            alone |= tokens_of(pool, [name], job)
        tokens_of(pool, names, job)  # warm-up: everything has been touched
        memmove = Memmove(pool.switcher)
        together = tokens_of(pool, names, job)
    answer = {
        "exact": together == alone,
        "switches": [asdict(record) for record in memmove.switches],
        "memmove_s": memmove.seconds,
    }
    sys.stdout.flush()
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
