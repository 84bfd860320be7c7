"""Real models on a device whose n-th driver call fails during generation, for every n up to `upto`.

Reports, per n, whether a switch failed, and the rounds whose tokens were not those of the first
round, which ran without a fault.
"""

from common import make_pool, prompts_of, read_job, report, token_ids_by_model

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

LAUNCH_FAILED = 719


def main() -> None:
    job = read_job()
    device = FaultyDevice(ak.Device("host", memory_bytes=job["device_memory"]))
    with make_pool(job, device) as pool:
        prompts = prompts_of(job)
        expected = token_ids_by_model(prompts, pool.generate(prompts))
        live = device.live
        different, failed, unbalanced = [], 0, []
        for n in range(1, job["upto"] + 1):
            device.reset()
            before = pool.loop.counters.failed_switches
            device.fail_call(n, code=LAUNCH_FAILED)
            answer = token_ids_by_model(prompts, pool.generate(prompts))
            device.reset()
            failed += pool.loop.counters.failed_switches - before
            if answer != expected:
                different.append(n)
            stats = pool.switcher.arena.stats()
            total = stats.owned_bytes + stats.free_bytes + stats.quarantined_bytes
            if total != stats.capacity_bytes or device.live != live:
                unbalanced.append(n)
        report(
            {
                "failed_switches": failed,
                "different": different,
                "unbalanced": unbalanced,
                "failed_models": pool.loop.counters.failed_models,
                "expected": expected,
            }
        )


if __name__ == "__main__":
    main()
