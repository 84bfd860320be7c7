"""Generates with all models, switching as often as the job says; reports tokens and switches.

`rounds`: how often the requests are run (the second time meets the prefix cache of the first).
`corrupt`: "weights" or "kv": one byte of each model's host image is flipped, once, right after an
eviction; the negative control of every claim that the images are what is restored.
"""

from collections.abc import Callable
from typing import Any

from common import make_pool, prompts_of, read_job, report, token_ids_by_model

import aegaeon_kernels as ak
from aegaeon.switching.residency import KVUnit, Unit, WeightsUnit
from aegaeon.vllm_plugin.offline import OfflinePool

# The top exponent bit of a bf16 number, in its second byte: about 1 becomes about 1e38.
EXPONENT_BIT = 0x40


def weight_offset(pool: OfflinePool, name: str, unit: Unit) -> int:
    """Of the final norm's first weight, which takes part in every logit."""
    worker = pool.engines[name].core.model_executor.driver_worker.worker
    weights = dict(worker.model_runner.get_model().named_parameters())
    norm = next(weights[key] for key in weights if key.endswith("model.norm.weight"))
    return norm.data_ptr() - unit.region.address + 1


def kv_offset(unit: KVUnit) -> int | None:
    """Of the first number that is kept for the first token of a live block."""
    live = unit.book.live()
    return unit.copies[live[0]] + 1 if live else None


def flip_once_after_eviction(
    unit: Unit, image: ak.HostImage, offset: Callable[[], int | None]
) -> None:
    unmap = unit.unmap
    flipped = False

    def unmap_and_flip() -> None:
        nonlocal flipped
        unmap()
        at = offset()
        if not flipped and at is not None:
            image.tensor()[at] ^= EXPONENT_BIT
            flipped = True

    unit.unmap = unmap_and_flip  # type: ignore[method-assign]


def corrupt(pool: OfflinePool, what: str) -> None:
    for name, memory in pool.switcher.models.items():
        for unit in memory.units:
            if what == "weights" and isinstance(unit, WeightsUnit):
                at = weight_offset(pool, name, unit)
                flip_once_after_eviction(unit, unit.image, lambda at=at: at)
            if what == "kv" and isinstance(unit, KVUnit):
                store = pool.switcher.kv_store.image
                # Nothing stays on the device, where no image is read.
                unit.shrunk_bytes = lambda unit=unit: unit.mapped_bytes  # type: ignore[method-assign]
                flip_once_after_eviction(unit, store, lambda unit=unit: kv_offset(unit))


def count_preemptions(scheduler: Any, name: str, counts: dict[str, int]) -> None:
    preempt = scheduler._preempt_request

    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counting


def main() -> None:
    job = read_job()
    with make_pool(job) as pool:
        if "corrupt" in job:
            corrupt(pool, job["corrupt"])
        preemptions = dict.fromkeys(job["models"], 0)
        for name, engine in pool.engines.items():
            count_preemptions(engine.core.scheduler, name, preemptions)
        prompts = prompts_of(job)
        rounds, cached = [], []
        for _ in range(job.get("rounds", 1)):
            outputs = pool.generate(prompts)
            rounds.append(token_ids_by_model(prompts, outputs))
            cached.append(sum(output.num_cached_tokens for output in outputs))
        totals = pool.switcher.totals
        report(
            {
                "rounds": rounds,
                "cached": cached,
                "preemptions": preemptions,
                "steps": pool.loop.counters.steps,
                "warm": totals.warm,
                "hot": totals.hot,
                "bytes_in": totals.bytes_in,
                "bytes_out": totals.bytes_out,
            }
        )


if __name__ == "__main__":
    main()
