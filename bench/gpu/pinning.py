"""How fast does host memory get pinned, by the kind of memory?

Limit: touching each page once, by as many threads as memory has bandwidth for; published rates for
page-locking go from 1 GB/s (4 KiB pages, one thread) to 30 GB/s (huge pages, all threads).
"""

import time
from collections.abc import Iterator

from measure import quantiles
from setting import Result, Setting

import aegaeon_kernels as ak


def measure_pinning(setting: Setting) -> Iterator[Result]:
    for kind in ak.HostMemory.probe(setting.device):
        result: Result = {"result": f"pinning, {kind.kind}", "remark": kind.remark}
        if not kind.worked:
            yield result | {"skipped": kind.remark}
            continue
        try:
            yield result | _rate(setting, kind.kind)
        except ak.OutOfMemory as error:  # the probe has tried 2 MiB only
            yield result | {"skipped": str(error)}


def _rate(setting: Setting, kind: str) -> Result:
    size = setting.pinned_bytes
    pin_s, free_s = [], []
    for _ in range(3):
        started = time.perf_counter()
        pool = ak.HostPool(setting.device, size, kinds=[kind])
        pin_s.append(time.perf_counter() - started)
        pinned, remark = pool.pinned, pool.attempts[-1].remark
        started = time.perf_counter()
        pool.close()
        free_s.append(time.perf_counter() - started)
    return {
        "bytes": size,
        "pinned": pinned,
        "remark": remark,
        **quantiles("pin_ms", pin_s),
        **quantiles("free_ms", free_s),
        "gb_per_s": size / sorted(pin_s)[1] / 1e9,
    }
