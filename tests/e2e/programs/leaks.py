"""Switches many times between the models of the job while they generate; reports what the process
holds at two moments: after `warm_up` switches and after `switches`.

What takes memory only once is done before the first moment, so that what grows after it is a leak:
all requests have run once, and the host KV store, which fills as blocks are first stored, is
touched as a whole.
"""

import gc
import mmap
import threading
from pathlib import Path

import psutil
from common import make_pool, prompts_of, read_job, report

from aegaeon.switching.switcher import SwitchRecord


def holdings(pool) -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    stats = pool.switcher.arena.stats()
    return {
        "rss": process.memory_info().rss,
        "address_space": process.memory_info().vms,
        "mapped_bytes": mapped_device_bytes(),
        "fds": process.num_fds(),
        "threads": threading.active_count(),
        "native_threads": process.num_threads(),
        "handles": stats.num_handles,
        "owned": sum(stats.owners.values()),
        "free": stats.free_bytes,
        "quarantined": stats.quarantined_bytes,
    }


def mapped_device_bytes() -> int:
    """Of the host device's memory. In how many pieces depends on which handles are neighbours."""
    ranges = (
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "memfd:" in line
    )
    return sum(int(end, 16) - int(begin, 16) for begin, end in ranges)


def main() -> None:
    job = read_job()
    marks = [job["warm_up"], job["switches"]]
    seen: list[dict[str, int]] = []
    with make_pool(job) as pool:
        pool.switcher.kv_store.image.tensor()[:: mmap.PAGESIZE] += 0
        prompts = prompts_of(job)
        pool.generate(prompts)
        switches = 0
        done = False

        def count(record: SwitchRecord) -> None:
            nonlocal switches, done
            switches += 1
            if switches in marks:
                seen.append(holdings(pool))
                done = switches == marks[-1]

        pool.switcher.on_switch = count
        while not done:
            pool.generate(prompts)
        report({"seen": seen, "switches": switches})


if __name__ == "__main__":
    main()
