"""A model is added to a pool while the n-th driver call fails, for every n until none does.

After each failure the pool is as before: nothing of the model is left, and the one that was there
first goes on. Reports what was different after which n.
"""

import gc

from common import make_pool, prompts_of, read_job, report, token_ids_by_model

import aegaeon_kernels as ak
from aegaeon.core.config import ModelConfig
from aegaeon.core.errors import AegaeonError
from aegaeon_kernels.testing import FaultyDevice

LAUNCH_FAILED = 719


def memory_held(live: dict[str, int]) -> dict[str, int]:
    """Without what ends with the failed model's own objects: its host image, and the address range
    that its tensors keep. vLLM refers to the last model it began to build until the next one.
    """
    kept = ("host_allocations", "reservations")
    return {kind: count for kind, count in live.items() if kind not in kept}


def main() -> None:
    job = read_job()
    late = job["models"].pop(job["late"])
    device = FaultyDevice(ak.Device("host", memory_bytes=job["device_memory"]))
    with make_pool(job, device) as pool:
        prompts = prompts_of(job)
        model = ModelConfig(
            model=late,
            name=job["late"],
            kv_memory=job["kv_memory"],
            max_model_len=job["max_model_len"],
            vllm=job["vllm"],
        )
        first = [prompt for prompt in prompts if prompt.model != job["late"]]
        expected = token_ids_by_model(first, pool.generate(first))
        wrong, n = [], 0
        while True:
            n += 1
            before = memory_held(device.live)
            device.reset()
            device.fail_call(n, code=LAUNCH_FAILED)
            try:
                pool.add_model(model)
            except (AegaeonError, ak.Error):
                device.reset()
            else:
                device.reset()
                break
            stats = pool.switcher.arena.stats()
            total = stats.owned_bytes + stats.free_bytes + stats.quarantined_bytes
            sound = {
                "ledger": total == stats.capacity_bytes,
                "forgotten": job["late"] not in pool.switcher.models,
                # The first model may have been evicted for the late one; it comes back.
                "tokens": token_ids_by_model(first, pool.generate(first)) == expected,
            }
            sound["driver objects"] = memory_held(device.live) == before
            if not all(sound.values()):
                wrong.append([n, sound])
        answers = token_ids_by_model(prompts, pool.generate(prompts))
        gc.collect()
        reservations = device.live["reservations"]
        report(
            {
                "failures": n - 1,
                "wrong": wrong,
                "answers": answers,
                "reservations": reservations,
            }
        )


if __name__ == "__main__":
    main()
