"""How long does a switch take, compared with merely copying its bytes?

    pytest bench/bench_switch.py          (with --keep-results the figures go to results/)

Limit: a switch cannot be faster than memory can be copied. The baseline is `memmove` of exactly the
bytes that the switch moves, in one thread, from the same host images, into memory that is mapped
and faulted in, in turns with the switches, so that both find the same load and the same caches.
Every destination is larger than the last-level cache. Goals: at most 1.3x of that from 64 MiB on;
less than 1 ms when the model is resident.
"""

import ctypes
import mmap
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aegaeon_kernels as ak
import numpy as np
import pytest
from aegaeon.core.clock import MonotonicClock
from aegaeon.switching.residency import KVUnit
from aegaeon.switching.switcher import Switcher, SwitchRecord
from aegaeon_kernels.kv_layout import KVLayout, Plane
from measure import paired_ratio, quantiles

MIB = 1 << 20
PHASES = ("save_s", "unmap_s", "map_s", "load_s")
# Of a KV cache: pages of one block in so many layers, as vLLM lays them out.
LAYERS = 16
PAGE_BYTES = 32 << 10


@dataclass
class HostedPair:
    """Two models of `weight_bytes` and a KV cache of an eighth of that, half of it live."""

    switcher: Switcher
    weights: dict[str, ak.HostImage]
    kv: dict[str, KVUnit]
    live_bytes: int
    seconds: list[float] = field(default_factory=list)
    minor_faults: list[int] = field(default_factory=list)

    def switch(self) -> None:
        """Activate the model that is not current; the time and the page faults are kept."""
        name = self.other()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        started = time.perf_counter()
        self.switcher.activate(name)
        self.seconds.append(time.perf_counter() - started)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        self.minor_faults.append(faults)

    def other(self) -> str:
        return next(name for name in self.weights if name != self.switcher.current)

    def records(self) -> Sequence[SwitchRecord]:
        return list(self.switcher.records)[-len(self.seconds) :]

    def forget(self) -> None:
        self.seconds.clear()
        self.minor_faults.clear()


@contextmanager
def hosted_pair(
    weight_bytes: int,
    *,
    together: bool = False,
    handle_bytes: int | None = None,
    chunk_bytes: int | None = None,
    depth: int | None = None,
) -> Iterator[HostedPair]:
    """Device memory for one of the two, or (`together`) for both."""
    kv_bytes = max(weight_bytes // 8, 2 * MIB)
    capacity = (weight_bytes + kv_bytes) * (2 if together else 1)
    device = ak.Device("host", memory_bytes=capacity)
    knobs = {"chunk_bytes": chunk_bytes, "depth": depth}
    switcher = Switcher(
        arena=ak.Arena(device, capacity_bytes=capacity, handle_bytes=handle_bytes),
        prefetcher=ak.Prefetcher(device, **{k: v for k, v in knobs.items() if v is not None}),
        clock=MonotonicClock(),
    )
    num_blocks = kv_bytes // (LAYERS * PAGE_BYTES)
    layout = KVLayout(
        planes=tuple(Plane(i * num_blocks * PAGE_BYTES, PAGE_BYTES) for i in range(LAYERS)),
        block_bytes=PAGE_BYTES,
        num_blocks=num_blocks,
        size_bytes=kv_bytes,
    )
    random = np.random.default_rng(0)
    live = sorted(random.choice(num_blocks, num_blocks // 2, replace=False).tolist())
    weights, kv = {}, {}
    try:
        for name in ("a", "b"):
            image = ak.HostImage.allocate(weight_bytes, device=device, name=name)
            bytes_of(image)[:] = random.integers(0, 256, weight_bytes, dtype=np.uint8)
            image.seal()
            weights[name] = image
            switcher.add_model(name)
            switcher.add_weights(name, image)
            kv[name] = switcher.add_kv(name, kv_bytes)
            kv[name].layouts = (layout,)
            kv[name].live_blocks = lambda: live
            switcher.activate(name)
            np.from_dlpack(kv[name].region)[:] = random.integers(0, 256, kv_bytes, dtype=np.uint8)
        yield HostedPair(switcher, weights, kv, len(live) * layout.bytes_per_block)
    finally:
        switcher.close()


def bytes_of(image: ak.HostImage) -> np.ndarray:
    return np.asarray(memoryview(image))


def check_exact(pair: HostedPair) -> None:
    """After two switches each, both models have every byte of their weights and live blocks."""
    before = {}
    for name in pair.weights:
        pair.switcher.activate(name)
        before[name] = live_bytes(pair.kv[name]).copy()
    for name in (*pair.weights, *pair.weights):
        pair.switcher.activate(name)
        unit = pair.switcher.models[name].units[0]
        assert np.array_equal(np.from_dlpack(unit.region), bytes_of(pair.weights[name]))
        assert np.array_equal(live_bytes(pair.kv[name]), before[name])


def live_bytes(unit: KVUnit) -> np.ndarray:
    cache = np.from_dlpack(unit.region)
    ranges = unit.layouts[0].ranges(unit.live_blocks())
    return np.concatenate([cache[start : start + size] for start, size in ranges])


@dataclass
class Memmove:
    """Copies what a switch of `pair` copies, into and out of memory of its own."""

    pair: HostedPair

    def __post_init__(self) -> None:
        num_bytes = len(next(iter(self.pair.weights.values()))) + 2 * self.pair.live_bytes
        self._memory = mmap.mmap(-1, num_bytes)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # the baseline at its best
        self._array = np.frombuffer(self._memory, dtype=np.uint8)
        self._array[:] = 1  # faulted in
        self._kv_out = np.ones(self.pair.live_bytes, dtype=np.uint8)
        self.seconds: list[float] = []

    def run(self, name: str) -> None:
        """KV of the model that leaves out; weights and KV of `name` in."""
        image, kv = self.pair.weights[name], self.pair.kv[name].image
        live = self.pair.live_bytes
        device = self._array.ctypes.data
        started = time.perf_counter()
        ctypes.memmove(self._kv_out.ctypes.data, device + len(image) + live, live)
        ctypes.memmove(device, image.address, len(image))
        ctypes.memmove(device + len(image), kv.address, live)
        self.seconds.append(time.perf_counter() - started)


def measure_pair(pair: HostedPair, benchmark: Any, rounds: int) -> dict[str, Any]:
    """Switches and copies in turns; the figures of a result."""
    pair.forget()
    memmove = Memmove(pair)
    # Each takes the image that the other took a round ago.
    benchmark.pedantic(
        pair.switch,
        setup=lambda: memmove.run(pair.switcher.current),
        rounds=rounds,
        warmup_rounds=0,
    )
    records = pair.records()
    num_bytes = records[-1].bytes_in + records[-1].bytes_out
    assert all(record.path == "warm" for record in records)
    assert num_bytes == len(pair.weights["a"]) + 2 * pair.live_bytes
    figures: dict[str, Any] = {"mib_moved": num_bytes / MIB, "rounds": len(records)}
    figures |= quantiles("switch_ms", pair.seconds) | quantiles("memmove_ms", memmove.seconds)
    figures["gb_per_s"] = num_bytes / statistics.median(pair.seconds) / 1e9
    figures["memmove_gb_per_s"] = num_bytes / statistics.median(memmove.seconds) / 1e9
    figures["ratio"] = paired_ratio(pair.seconds, memmove.seconds)
    for phase in PHASES:
        spent = [getattr(record, phase) for record in records]
        figures[f"{phase.removesuffix('_s')}_ms"] = statistics.median(spent) * 1e3
    figures["faults_per_switch"] = statistics.median(pair.minor_faults)
    return figures


@pytest.mark.parametrize("size_mib", [64, 256, 512])
def test_warm_switch(size_mib, benchmark, record):
    with hosted_pair(size_mib * MIB) as pair:
        check_exact(pair)
        figures = measure_pair(pair, benchmark, rounds=max(12, 4096 // size_mib))
        check_exact(pair)
    record(f"warm switch, {size_mib} MiB", benchmark, **figures)
