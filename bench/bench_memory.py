"""What do mapping and loading cost on the host device?

    pytest bench/bench_memory.py          (with --keep-results the figures go to results/)

Limits: mapping memory that was touched before moves page tables, one pointer for every 2 MiB: a
system call for each run of neighbours, and never a page fault. A load cannot be faster than
memory is: the baseline is one `memcpy` of the same bytes by one thread into memory that is mapped
and faulted in, in turns with the loads. Goal: 0.9x of its bandwidth or better.
"""

import ctypes
import itertools
import mmap
import resource
import statistics
import time
from typing import Any

import numpy as np
import pytest
from measure import paired_ratio, quantiles

import aegaeon_kernels as ak
from aegaeon_kernels import _C

MIB, GIB = 1 << 20, 1 << 30
READWRITE = _C.Access.READWRITE


class Gibibyte:
    """1 GiB of handles of one size, and two addresses to have them at, by plain driver calls."""

    def __init__(self, handle_bytes: int) -> None:
        self._driver = ak.Device("host", memory_bytes=GIB)._driver
        self.handle_bytes = handle_bytes
        self.addresses = [self._value(self._driver.address_reserve(GIB, 0)) for _ in range(2)]
        self.handles: list[int] = []
        self.seconds: dict[str, list[float]] = {}
        self.minor_faults: list[int] = []

    @staticmethod
    def _value(result: tuple[int, int]) -> int:
        code, value = result
        assert code == 0
        return value

    def create(self) -> None:
        with self._timed("create"):
            self.handles = [
                self._value(self._driver.mem_create(self.handle_bytes))
                for _ in range(GIB // self.handle_bytes)
            ]

    def map(self, address: int) -> None:
        with self._timed("map"):
            for i, handle in enumerate(self.handles):
                at = address + i * self.handle_bytes
                assert self._driver.mem_map(at, self.handle_bytes, 0, handle) == 0
        with self._timed("access"):
            assert self._driver.mem_set_access(address, GIB, READWRITE) == 0

    def fill(self, address: int, value: int) -> None:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with self._timed("fill"):
            ctypes.memset(address, value, GIB)
        self.minor_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)

    def unmap(self, address: int) -> None:
        with self._timed("unmap"):
            assert self._driver.mem_unmap(address, GIB) == 0

    def release(self) -> None:
        with self._timed("release"):
            for handle in self.handles:
                assert self._driver.mem_release(handle) == 0

    def forget(self) -> None:
        self.seconds.clear()
        self.minor_faults.clear()

    def _timed(self, phase: str) -> "Timed":
        return Timed(self.seconds.setdefault(phase, []))


class Timed:
    """Appends how long its block took."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.append(time.perf_counter() - self._started)


def is_filled(address: int, value: int) -> bool:
    view = np.ctypeslib.as_array((ctypes.c_uint8 * GIB).from_address(address))
    return bool((view[:: 64 << 10] == value).all())


@pytest.mark.parametrize("handle_mib", [2, 8, 32, 128])
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "recreate"])
def test_map_and_unmap_a_gibibyte(reuse, handle_mib, benchmark, record):
    """Memory changes places and is written: its handles are kept, or made anew each time."""
    memory = Gibibyte(handle_mib * MIB)
    places = itertools.cycle(memory.addresses)
    values = itertools.cycle(range(1, 256))

    def move() -> None:
        if not reuse:
            memory.create()
        address, value = next(places), next(values)
        memory.map(address)
        memory.fill(address, value)
        memory.unmap(address)
        if not reuse:
            memory.release()

    if reuse:  # the bytes come along
        memory.create()
        memory.map(memory.addresses[1])
        memory.fill(memory.addresses[1], 7)
        memory.unmap(memory.addresses[1])
        memory.map(memory.addresses[0])
        assert is_filled(memory.addresses[0], 7)
        memory.unmap(memory.addresses[0])
    else:  # and do not, if they are somebody else's
        move()
        memory.create()
        memory.map(memory.addresses[1])
        assert is_filled(memory.addresses[1], 0)
        memory.unmap(memory.addresses[1])
        memory.release()
    memory.forget()
    benchmark.pedantic(move, rounds=24 if reuse else 8, warmup_rounds=0)
    rounds = len(memory.minor_faults)
    figures: dict[str, Any] = {"rounds": rounds}
    for phase, seconds in memory.seconds.items():
        figures |= quantiles(f"{phase}_ms", seconds)
    moving = [s for phase, s in memory.seconds.items() if phase != "fill"]
    figures |= quantiles("all_but_fill_ms", [sum(phases) for phases in zip(*moving, strict=True)])
    figures["faults_per_round"] = statistics.median(memory.minor_faults)
    what = "reused" if reuse else "made anew"
    record(f"1 GiB, handles of {handle_mib} MiB {what}", benchmark, **figures)


@pytest.mark.parametrize("handle_mib", [2, 32])
def test_load_of_a_gibibyte(handle_mib, benchmark, record):
    """Host image to region by the prefetcher, against memcpy of the same bytes."""
    device = ak.Device("host", memory_bytes=GIB)
    image = ak.HostImage.allocate(GIB, device=device)
    contents = np.asarray(memoryview(image))
    contents[:] = np.random.default_rng(0).integers(0, 256, GIB, dtype=np.uint8)
    ours = mmap.mmap(-1, GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ours.madvise(mmap.MADV_HUGEPAGE)  # the baseline at its best
    baseline = np.frombuffer(ours, dtype=np.uint8)
    baseline[:] = 1
    memcpy_seconds: list[float] = []
    load_seconds: list[float] = []
    arena = ak.Arena(device, capacity_bytes=GIB, handle_bytes=handle_mib * MIB)
    with ak.Prefetcher(device) as prefetcher, arena:
        region = arena.reserve(GIB, owner="model", tag="weights")
        region.map(contents="preserve")

        def memcpy() -> None:
            with Timed(memcpy_seconds):
                ctypes.memmove(baseline.ctypes.data, image.address, GIB)

        def load() -> None:
            with Timed(load_seconds):
                prefetcher.load(image, region).wait()

        memcpy()
        load()
        assert np.array_equal(np.from_dlpack(region), contents)
        memcpy_seconds.clear()
        load_seconds.clear()
        benchmark.pedantic(load, setup=memcpy, rounds=32, warmup_rounds=0)
        assert np.array_equal(np.from_dlpack(region), contents)
    figures: dict[str, Any] = {"rounds": len(load_seconds)}
    figures |= quantiles("load_ms", load_seconds) | quantiles("memcpy_ms", memcpy_seconds)
    figures["gb_per_s"] = GIB / statistics.median(load_seconds) / 1e9
    figures["memcpy_gb_per_s"] = GIB / statistics.median(memcpy_seconds) / 1e9
    figures["of_memcpy_bandwidth"] = paired_ratio(memcpy_seconds, load_seconds)
    record(f"load of 1 GiB, handles of {handle_mib} MiB", benchmark, **figures)
