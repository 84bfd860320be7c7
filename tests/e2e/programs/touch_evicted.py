"""Touches a region of an evicted model; the process must not survive it.

`what`: "weights" or "kv". Prints that it is about to, with the address, then reads one byte.
"""

import ctypes

from common import make_pool, read_job, report


def main() -> None:
    job = read_job()
    pool = make_pool(job)
    first, *_, last = job["models"]
    pool.switcher.activate(first)
    pool.switcher.activate(last)
    units = {unit.tag: unit for unit in pool.switcher.models[first].units}
    unit = units[job["what"]]
    assert not unit.resident
    report({"touching": unit.region.address})
    ctypes.string_at(unit.region.address, 1)
    report({"survived": True})


if __name__ == "__main__":
    main()
