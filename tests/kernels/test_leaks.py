"""A thousand switches leave nothing behind: descriptors, mappings, threads, memory."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from kernel_support import GRANULE, assert_ledger

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

NUM_CYCLES = 1000


def footprint() -> dict[str, int]:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        "resident_mib": int(status.split("VmRSS:")[1].split()[0]) // 1024,
    }


def test_switching_for_a_long_time_leaves_nothing_behind(device: FaultyDevice) -> None:
    arena = ak.Arena(device, capacity_bytes=8 * GRANULE, handle_bytes=2 * GRANULE)
    regions = [arena.reserve(6 * GRANULE, owner=name) for name in "ab"]
    images = []
    for value in (1, 2):
        images.append(ak.HostImage.allocate(6 * GRANULE, device=device))
        np.frombuffer(images[-1], np.uint8)[:] = value
    prefetcher = ak.Prefetcher(device)
    addresses = [region.address for region in regions]
    order = [(i * GRANULE, 4096) for i in range(6)]

    def switch(i: int) -> None:
        region, image = regions[i % 2], images[i % 2]
        region.map(0, 6 * GRANULE - (i % 3) * GRANULE)
        prefetcher.load(image, region, order=order[: 6 - i % 3]).wait(20)
        region.unmap()

    for i in range(20):
        switch(i)
    before, live = footprint(), dict(device.live)
    for i in range(NUM_CYCLES):
        switch(i)
    after = footprint()
    assert device.live == live
    assert [region.address for region in regions] == addresses
    assert assert_ledger(arena).total_created < 20
    for kind in ("descriptors", "threads", "mappings"):
        assert after[kind] <= before[kind] + 2, (kind, before, after)
    assert after["resident_mib"] <= before["resident_mib"] + 8, (before, after)
    prefetcher.close()
    arena.close()


@pytest.mark.parametrize("explicit", [True, False])
def test_opening_and_closing_everything_leaves_nothing_behind(explicit: bool) -> None:
    def cycle() -> None:
        device = ak.Device("host", memory_bytes=64 * GRANULE)
        arena = ak.Arena(device, capacity_bytes=32 * GRANULE, handle_bytes=4 * GRANULE)
        region = arena.reserve(16 * GRANULE, owner="a")
        region.map(GRANULE, 9 * GRANULE)
        image = ak.HostImage.allocate(4 * GRANULE, device=device)
        prefetcher = ak.Prefetcher(device)
        ticket = prefetcher.load(image, region, order=[(GRANULE, GRANULE)])
        if explicit:
            ticket.wait(20)
            prefetcher.close()
            region.close()
            arena.close()

    for _ in range(5):
        cycle()
    before = footprint()
    for _ in range(200):
        cycle()
    after = footprint()
    for kind in ("descriptors", "threads", "mappings"):
        assert after[kind] <= before[kind] + 2, (kind, before, after)
    assert after["resident_mib"] <= before["resident_mib"] + 16, (before, after)


def test_many_handles_need_no_descriptors_each(host: FaultyDevice) -> None:
    before = footprint()["descriptors"]
    arena = ak.Arena(host, capacity_bytes=400 * GRANULE, handle_bytes=GRANULE)
    region = arena.reserve(400 * GRANULE, owner="a")
    region.map()
    assert footprint()["descriptors"] <= before + 2


def test_unmapped_ranges_merge_again(host: FaultyDevice) -> None:
    arena = ak.Arena(host, capacity_bytes=100 * GRANULE, handle_bytes=GRANULE)
    others = arena.reserve(100 * GRANULE, owner="first")
    others.map()
    others.unmap()
    before = footprint()["mappings"]
    regions = [arena.reserve(100 * GRANULE, owner=str(i)) for i in range(20)]
    for region in regions:
        region.map()
        region.unmap()
    assert footprint()["mappings"] <= before + 60, "a mapping of the process per past handle"
