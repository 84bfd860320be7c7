"""The functions that torch's pluggable allocator calls, called as torch calls them: by name, in C.

What torch makes of them is for a GPU: test_on_a_gpu.py.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator

import pytest
from kernel_support import GRANULE, DeviceBytes, StubCuda, assert_ledger, pattern, run_program

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

LARGE = 2 * GRANULE

hooks = ctypes.CDLL(_C.__file__)
hooks.aegaeon_torch_malloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
hooks.aegaeon_torch_malloc.restype = ctypes.c_void_p
hooks.aegaeon_torch_free.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
hooks.aegaeon_torch_free.restype = None


class Torch:
    """What torch's caching allocator does of a MemPool whose allocator these functions are."""

    def __init__(self, device: FaultyDevice) -> None:
        self.device = device
        code, self.stream = device._driver.stream_create()
        assert code == 0
        self.sizes: dict[int, int] = {}

    def malloc(self, size_bytes: int, device_index: int = 0) -> int | None:
        address: int | None = hooks.aegaeon_torch_malloc(size_bytes, device_index, self.stream)
        if address is not None:
            self.sizes[address] = size_bytes
        return address

    def free(self, address: int) -> None:
        hooks.aegaeon_torch_free(address, self.sizes.pop(address), 0, self.stream)

    def close(self) -> None:
        for address in list(self.sizes):
            self.free(address)
        assert self.device._driver.stream_destroy(self.stream) == 0


class Pool:
    """The native part of ak.TorchPool, which exists on every device."""

    def __init__(self, *regions: ak.Region) -> None:
        self._pool = _C.TorchPool([region._region for region in regions])
        self.trim, self.stats = self._pool.trim, self._pool.stats

    def __enter__(self) -> Pool:
        self._pool.activate()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.deactivate()


@pytest.fixture
def torch(device: FaultyDevice) -> Iterator[Torch]:
    caller = Torch(device)
    yield caller
    caller.close()


@pytest.fixture
def arena(device: FaultyDevice) -> ak.Arena:
    return ak.Arena(device, capacity_bytes=8 * GRANULE, handle_bytes=LARGE)


def test_memory_comes_with_the_piece_and_goes_with_it(
    arena: ak.Arena, torch: Torch, device_bytes: DeviceBytes
) -> None:
    region = arena.reserve(6 * GRANULE, owner="model", tag="weights")
    with Pool(region) as pool:
        assert region.mapped_bytes == 0
        first, second = torch.malloc(1000), torch.malloc(LARGE)
    assert first == region.address
    assert second == region.address + 1024, "pieces start at multiples of 512 bytes"
    assert region.mapped_ranges() == [(0, 2 * LARGE)], "whole handles, as far as the pieces reach"
    assert assert_ledger(arena).owners == {("model", "weights"): 2 * LARGE}
    data = pattern(LARGE, seed=1)
    device_bytes.write(second, data)
    torch.free(first)
    assert region.mapped_bytes == 2 * LARGE, "both handles hold a part of the other piece"
    assert_bitwise_equal(device_bytes.read(second, LARGE), data)
    assert pool.stats().allocated_bytes == LARGE
    torch.free(second)
    assert region.mapped_bytes == pool.stats().num_pieces == 0


def test_the_tightest_hole_is_taken(arena: ak.Arena, torch: Torch) -> None:
    region = arena.reserve(8 * GRANULE, owner="a")
    with Pool(region):
        holes = {}
        for size in (4096, 512, 1024, 512, 2048, 512):
            holes[torch.malloc(size)] = size
        for address, size in list(holes.items()):
            if size != 512:
                torch.free(address)
        by_size = {size: address for address, size in holes.items()}
        assert [torch.malloc(size) for size in (2000, 600, 3000)] == [
            by_size[2048],
            by_size[1024],
            by_size[4096],
        ]


def test_when_small_handles_are_all_there_is_they_do(arena: ak.Arena, torch: Torch) -> None:
    holder = arena.reserve(7 * GRANULE, owner="other")
    holder.map()
    region = arena.reserve(4 * GRANULE, owner="a")
    with Pool(region):
        address = torch.malloc(GRANULE // 2)
        assert address is not None
        assert region.mapped_ranges() == [(0, GRANULE)]
        assert torch.malloc(GRANULE // 2) is not None
        assert torch.malloc(512) is None


def test_out_of_memory_is_null_and_the_next_call_starts_afresh(
    arena: ak.Arena, torch: Torch
) -> None:
    holder = arena.reserve(6 * GRANULE, owner="holder")
    holder.map()
    region = arena.reserve(8 * GRANULE, owner="a")
    with Pool(region) as pool:
        assert torch.malloc(3 * GRANULE) is None
        assert region.mapped_bytes == 0
        stats = pool.stats()
        assert (stats.num_failed, stats.num_pieces, stats.allocated_bytes) == (1, 0, 0)
        assert "'holder'" in stats.last_failure
        assert torch.malloc(2 * GRANULE) is not None
        holder.unmap()
        assert torch.malloc(3 * GRANULE) is not None
        assert torch.malloc(9 * GRANULE) is None
        assert "addresses" in pool.stats().last_failure
        assert torch.malloc(2**64 - 1) is None
        assert torch.malloc(512) is not None


def test_a_limit_of_the_owner_holds_for_torch_too(arena: ak.Arena, torch: Torch) -> None:
    region = arena.reserve(8 * GRANULE, owner="a")
    arena.set_limit("a", max_bytes=LARGE)
    with Pool(region) as pool:
        assert torch.malloc(LARGE) is not None
        assert torch.malloc(512) is None
        assert "at most" in pool.stats().last_failure


def test_a_second_region_serves_when_the_first_cannot(device: FaultyDevice, torch: Torch) -> None:
    small = ak.Arena(device, capacity_bytes=2 * GRANULE, handle_bytes=GRANULE)
    large = ak.Arena(device, capacity_bytes=8 * GRANULE, handle_bytes=GRANULE)
    first, second = small.reserve(3 * GRANULE, owner="a"), large.reserve(8 * GRANULE, owner="a")
    with Pool(first, second):
        assert torch.malloc(2 * GRANULE) == first.address
        assert torch.malloc(GRANULE) == second.address, "the first has addresses, but no memory"
        assert torch.malloc(4 * GRANULE) == second.address + GRANULE


def test_the_pool_that_is_active_in_the_thread_is_asked(
    arena: ak.Arena, torch: Torch, capfd: pytest.CaptureFixture[str]
) -> None:
    a, b = (arena.reserve(2 * GRANULE, owner=owner) for owner in "ab")
    elsewhere: list[int | None] = []
    with Pool(a) as outer:
        with Pool(b):
            assert torch.malloc(512) == b.address
            assert torch.malloc(512, device_index=1) is None
            thread = threading.Thread(target=lambda: elsewhere.append(torch.malloc(512)))
            thread.start()
            thread.join()
        assert torch.malloc(512) == a.address
    assert elsewhere == [None]
    assert torch.malloc(512) is None
    assert capfd.readouterr().err.count("no TorchPool is in use") == 3
    with pytest.raises(ak.LifecycleError, match="not active"):
        outer._pool.deactivate()


def test_an_evicted_model_comes_back_to_its_addresses(
    arena: ak.Arena, torch: Torch, device_bytes: DeviceBytes
) -> None:
    region = arena.reserve(6 * GRANULE, owner="a")
    with Pool(region) as pool:
        kept, freed = torch.malloc(LARGE), torch.malloc(GRANULE)
        assert kept is not None
        assert freed is not None
        ranges = region.mapped_ranges()
        region.unmap()
        assert assert_ledger(arena).owned_bytes == 0
        torch.free(freed)  # in the middle of it
        for offset, size in ranges:
            region.map(offset, size)
        device_bytes.fill(kept, 7, LARGE)
        assert pool.trim() == LARGE
        assert (device_bytes.read(kept, LARGE) == 7).all()


def test_memory_may_be_freed_when_the_pool_is_long_gone(device: FaultyDevice, torch: Torch) -> None:
    arena = ak.Arena(device, capacity_bytes=8 * GRANULE)
    with Pool(arena.reserve(4 * GRANULE, owner="a")):
        address = torch.malloc(GRANULE)
    assert address is not None
    del arena
    gc.collect()
    assert device.live["reservations"] == 1
    torch.free(address)
    assert device.live == {"streams": 1}


def test_a_region_serves_one_pool(arena: ak.Arena, device: FaultyDevice) -> None:
    region, other = (arena.reserve(2 * GRANULE, owner="a") for _ in range(2))
    pool = Pool(region)
    for regions in ((region,), (other, region), (other, other)):
        with pytest.raises(ak.LifecycleError, match="one torch pool"):
            Pool(*regions)
    del pool
    Pool(region, other)


def test_pools_are_of_one_device(device: FaultyDevice, arena: ak.Arena) -> None:
    elsewhere = ak.Arena(ak.Device("host", memory_bytes=8 * GRANULE), capacity_bytes=2 * GRANULE)
    regions = [a.reserve(2 * GRANULE, owner="a") for a in (arena, elsewhere)]
    with pytest.raises(ValueError, match="one device"):
        Pool(*regions)
    with pytest.raises(ValueError, match="at least one"):
        Pool()
    with pytest.raises(ValueError, match=r"region\.tensor"):
        ak.TorchPool(regions[1])


def test_freeing_what_is_not_ours_is_said_and_survived(
    torch: Torch, capfd: pytest.CaptureFixture[str]
) -> None:
    hooks.aegaeon_torch_free(None, 0, 0, torch.stream)
    assert capfd.readouterr().err == ""
    hooks.aegaeon_torch_free(512, 512, 0, torch.stream)
    assert "not from here" in capfd.readouterr().err


@pytest.mark.parametrize("code", [2, 719])
@pytest.mark.parametrize("persistent", [False, True])
def test_every_driver_call_of_an_allocation_may_fail(
    device: FaultyDevice, arena: ak.Arena, torch: Torch, code: int, persistent: bool
) -> None:
    region = arena.reserve(6 * GRANULE, owner="a")
    region.map(LARGE + GRANULE, GRANULE)  # so that two gaps are to be filled
    with Pool(region) as pool:
        for n in range(1, 50):
            device.reset()
            device.fail_call(n, code=code, persistent=persistent)
            address = torch.malloc(3 * LARGE)
            calls = device.num_calls
            device.reset()
            assert_ledger(arena)
            if address is not None:
                assert calls < n or not persistent, "a failed call went unnoticed"
                torch.free(address)
                if calls < n:
                    break
            assert pool.stats().num_pieces == 0
            pool.trim()
            if not region.mapped_bytes:
                region.map(LARGE + GRANULE, GRANULE)
        assert n > 5


@pytest.mark.parametrize("code", [2, 719])
def test_what_the_driver_will_not_unmap_goes_with_trim(
    device: FaultyDevice, arena: ak.Arena, torch: Torch, code: int
) -> None:
    region = arena.reserve(6 * GRANULE, owner="a")
    with Pool(region) as pool:
        address = torch.malloc(LARGE)
        assert address is not None
        device.fail_call(1, call="mem_unmap", code=code)
        torch.free(address)
        device.reset()
        assert (pool.stats().num_pieces, region.mapped_bytes) == (0, LARGE)
        assert "mem_unmap" in pool.stats().last_failure
        assert pool.trim() == LARGE
        assert region.mapped_bytes == 0


def test_freeing_while_a_graph_is_captured_waits_for_nothing(stub_cuda: StubCuda) -> None:
    device = FaultyDevice(ak.Device("cuda:0", library=stub_cuda.path))
    torch = Torch(device)
    arena = ak.Arena(device, capacity_bytes=8 * GRANULE, handle_bytes=LARGE)
    region = arena.reserve(6 * GRANULE, owner="a")
    with Pool(region) as pool:
        address = torch.malloc(LARGE)
        assert address is not None
        with stub_cuda.capturing(torch.stream):
            torch.free(address)
            assert torch.malloc(LARGE) == address
            torch.free(address)
        assert region.mapped_bytes == LARGE
        assert pool.trim() == LARGE
    torch.close()


def test_a_process_may_end_while_torch_holds_memory() -> None:
    program = """
import ctypes, sys
import aegaeon_kernels as ak
from aegaeon_kernels import _C
G = 2 << 20
arena = ak.Arena(ak.Device("host", memory_bytes=8 * G), capacity_bytes=8 * G)
region = arena.reserve(4 * G, owner="a")
hooks = ctypes.CDLL(_C.__file__)
hooks.aegaeon_torch_malloc.restype = ctypes.c_void_p
pool = _C.TorchPool([region._region])
pool.activate()
address = hooks.aegaeon_torch_malloc(ctypes.c_size_t(5), 0, None)
ctypes.memset(address, 1, 5)
"""
    for end in ("", "del pool, region, arena", "import os; os._exit(0)"):
        result = run_program(program + end)
        assert (result.returncode, result.stderr) == (0, "")
