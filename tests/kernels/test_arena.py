"""Arena and Region: what is mapped where, for whom, and what happens when it does not fit."""

from __future__ import annotations

import threading

import pytest
from kernel_support import GRANULE, MIB, DeviceBytes, assert_ledger, pattern

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

LARGE = 4 * GRANULE


@pytest.fixture
def arena(device: FaultyDevice) -> ak.Arena:
    return ak.Arena(device, capacity_bytes=16 * LARGE, handle_bytes=LARGE)


def test_nothing_is_created_before_it_is_mapped(device: FaultyDevice, arena: ak.Arena) -> None:
    region = arena.reserve(8 * LARGE, owner="a", tag="weights")
    assert device.live == {"reservations": 1}
    stats = assert_ledger(arena)
    assert (stats.free_bytes, stats.owners, stats.created_bytes) == (16 * LARGE, {}, 0)
    assert (region.mapped_bytes, region.size_bytes, region.generation) == (0, 8 * LARGE, 0)
    assert region.address % LARGE == 0


def test_map_and_unmap_move_memory_between_free_and_owner(
    device: FaultyDevice, arena: ak.Arena
) -> None:
    region = arena.reserve(8 * LARGE, owner="a", tag="weights")
    address = region.address
    region.map(0, 4 * LARGE, contents="preserve")
    stats = assert_ledger(arena)
    assert stats.owners == {("a", "weights"): 4 * LARGE}
    assert stats.free_bytes == 12 * LARGE
    region.map(6 * LARGE, LARGE, contents="preserve")
    assert region.mapped_ranges() == [(0, 4 * LARGE), (6 * LARGE, LARGE)]
    assert assert_ledger(arena).owners == {("a", "weights"): 5 * LARGE}
    region.unmap(LARGE, 2 * LARGE)
    assert region.mapped_ranges() == [(0, LARGE), (3 * LARGE, LARGE), (6 * LARGE, LARGE)]
    assert (region.mapped_bytes, region.generation) == (3 * LARGE, 3)
    region.unmap()
    assert region.mapped_ranges() == []
    assert region.address == address
    stats = assert_ledger(arena)
    assert (stats.owners, stats.free_bytes) == ({}, 16 * LARGE)
    assert device.live == {"reservations": 1, "handles": 5}, "handles are kept"


def test_a_remap_makes_no_create_and_no_release(device: FaultyDevice, arena: ak.Arena) -> None:
    a = arena.reserve(8 * LARGE, owner="a")
    b = arena.reserve(8 * LARGE, owner="b")
    a.map()
    a.unmap()
    device.reset()
    for region in (b, a, b):
        region.map(contents="preserve")
        region.unmap()
    assert device.calls == {"mem_map": 24, "mem_set_access": 3, "mem_unmap": 3}
    stats = arena.stats()
    assert (stats.total_created, stats.total_released) == (8, 0)


def test_one_set_access_per_map_and_one_unmap_per_run(
    device: FaultyDevice, arena: ak.Arena
) -> None:
    region = arena.reserve(8 * LARGE, owner="a")
    region.map(GRANULE, 2 * LARGE)  # a head, one large handle, a tail
    assert device.calls["mem_set_access"] == 1
    region.map(5 * LARGE, LARGE)
    device.reset()
    region.unmap()
    assert device.calls == {"mem_unmap": 2}


@pytest.mark.parametrize(
    ("offset", "size", "large", "small"),
    [
        (0, 2 * LARGE, 2, 0),
        (0, LARGE + GRANULE, 1, 1),
        (0, 3 * GRANULE, 0, 3),
        (GRANULE, LARGE, 0, 4),  # three to the multiple, one after it
        (3 * GRANULE, LARGE + 2 * GRANULE, 1, 2),
    ],
)
def test_large_handles_lie_at_multiples_of_their_size(
    device: FaultyDevice, arena: ak.Arena, offset: int, size: int, large: int, small: int
) -> None:
    region = arena.reserve(4 * LARGE, owner="a")
    region.map(offset, size)
    stats = assert_ledger(arena)
    assert (stats.num_handles, stats.num_tail_handles) == (large, small)
    assert stats.owned_bytes == size
    if large:
        cut = -(-offset // LARGE) * LARGE
        with pytest.raises(ak.LifecycleError, match="inside the handle"):
            region.unmap(cut + GRANULE)
        region.unmap(cut, LARGE)


def test_contents_follow_the_handles_not_the_address(
    arena: ak.Arena, device_bytes: DeviceBytes
) -> None:
    a = arena.reserve(2 * LARGE, owner="a")
    a.map()
    data = pattern(2 * LARGE, seed=7)
    device_bytes.write(a.address, data)
    a.unmap()
    a.map()
    assert_bitwise_equal(device_bytes.read(a.address, 2 * LARGE), data)


def test_a_region_gets_back_the_handles_it_used_last(
    arena: ak.Arena, device_bytes: DeviceBytes
) -> None:
    regions = [arena.reserve(4 * LARGE, owner=name) for name in "abc"]
    for value, region in enumerate(regions, start=1):
        region.map()
        for slot in range(4):
            device_bytes.fill(region.address + slot * LARGE, 10 * value + slot, LARGE)
    for region in regions:
        region.unmap()
    for value, region in reversed(list(enumerate(regions, start=1))):
        region.map(LARGE, 2 * LARGE)
        for slot in (1, 2):
            found = device_bytes.read(region.address + slot * LARGE, LARGE)
            assert (found == 10 * value + slot).all()


def test_other_owners_bytes_survive_everything_one_owner_does(
    arena: ak.Arena, device_bytes: DeviceBytes
) -> None:
    other = arena.reserve(3 * LARGE, owner="other")
    other.map()
    data = pattern(3 * LARGE, seed=3)
    device_bytes.write(other.address, data)
    region = arena.reserve(16 * LARGE, owner="a")
    for offset, size in [(0, 13 * LARGE), (GRANULE, 5 * GRANULE), (0, 13 * LARGE)]:
        region.map(offset, size)
        device_bytes.fill(region.address + offset, 255, size)
        region.unmap()
        with pytest.raises(ak.OutOfMemory):
            region.map(0, 14 * LARGE)
    region.close()
    assert_bitwise_equal(device_bytes.read(other.address, 3 * LARGE), data)


def test_out_of_memory_says_who_holds_what(arena: ak.Arena) -> None:
    weights = arena.reserve(10 * LARGE, owner="qwen", tag="weights")
    weights.map()
    kv = arena.reserve(2 * LARGE, owner="qwen", tag="kv")
    kv.map()
    region = arena.reserve(8 * LARGE, owner="llama", tag="weights")
    with pytest.raises(ak.OutOfMemory) as caught:
        region.map()
    error = caught.value
    assert isinstance(error, MemoryError)
    assert isinstance(error, ak.DriverError)
    assert (error.call, error.code, error.bytes) == ("map", 2, 8 * LARGE)
    message = str(error)
    assert "cannot map 64 MiB for 'llama' (weights)" in message
    assert "32 MiB of 128 MiB free" in message
    assert "32 MiB missing" in message
    assert message.index("'qwen' (weights) 80 MiB") < message.index("'qwen' (kv) 16 MiB")
    assert region.mapped_bytes == 0
    assert_ledger(arena)
    region.map(0, 4 * LARGE)
    assert arena.stats().free_bytes == 0


def test_a_large_slot_is_filled_by_small_handles_and_they_stay_small(
    device: FaultyDevice, arena: ak.Arena
) -> None:
    smalls = arena.reserve(32 * LARGE, owner="small")
    for slot in range(16):  # all of the capacity as granules
        smalls.map(slot * 2 * LARGE + GRANULE, 3 * GRANULE)
        smalls.map(slot * 2 * LARGE + LARGE, GRANULE)
    assert assert_ledger(arena).num_tail_handles == 64
    smalls.unmap()
    large = arena.reserve(16 * LARGE, owner="large")
    device.reset()
    large.map(contents="preserve")
    assert device.calls == {"mem_map": 64, "mem_set_access": 1}
    assert (assert_ledger(arena).num_tail_handles, arena.stats().total_converted) == (64, 0)
    with pytest.raises(ak.LifecycleError, match="inside the handle"):
        large.unmap(GRANULE, GRANULE)  # where unmap cuts does not depend on what is behind
    large.unmap(LARGE, 2 * LARGE)
    assert assert_ledger(arena).total_released == 0


def test_a_tail_converts_a_large_handle_only_when_no_small_one_is_to_be_had(
    device: FaultyDevice, arena: ak.Arena
) -> None:
    large = arena.reserve(16 * LARGE, owner="large")
    large.map()
    large.unmap(LARGE)
    smalls = arena.reserve(4 * LARGE, owner="small")
    smalls.map(GRANULE, 2 * GRANULE)
    stats = assert_ledger(arena)
    assert (stats.num_handles, stats.num_tail_handles, stats.total_converted) == (15, 2, 1)
    assert device.live["handles"] == 17
    smalls.unmap()
    large.map(LARGE)
    smalls.close()
    stats = assert_ledger(arena)
    assert (stats.num_handles, stats.num_tail_handles, stats.total_converted) == (15, 4, 1)


def test_a_maximum_stops_its_owner_only(arena: ak.Arena) -> None:
    arena.set_limit("a", max_bytes=3 * LARGE)
    weights, kv = (arena.reserve(4 * LARGE, owner="a", tag=tag) for tag in ("weights", "kv"))
    weights.map(0, 2 * LARGE)
    with pytest.raises(ak.OutOfMemory, match="holds 16 MiB of at most 24 MiB; 8 MiB missing"):
        kv.map(0, 2 * LARGE)
    kv.map(0, LARGE)
    other = arena.reserve(13 * LARGE, owner="b")
    other.map()
    arena.set_limit("a", max_bytes=LARGE)
    assert weights.mapped_bytes == 2 * LARGE, "nothing is taken away"
    kv.unmap()
    with pytest.raises(ak.OutOfMemory, match="at most 8 MiB"):
        kv.map(0, GRANULE)
    arena.set_limit("a")
    kv.map(0, LARGE)


def test_a_minimum_is_kept_from_the_others(arena: ak.Arena) -> None:
    arena.set_limit("a", min_bytes=6 * LARGE)
    a, b = (arena.reserve(16 * LARGE, owner=owner) for owner in "ab")
    a.map(0, LARGE)
    with pytest.raises(ak.OutOfMemory, match="of which 40 MiB kept for other owners"):
        b.map(0, 11 * LARGE)
    b.map(0, 10 * LARGE)
    a.map(LARGE, 5 * LARGE)
    assert_ledger(arena)


def test_limits_that_cannot_hold_are_refused(arena: ak.Arena) -> None:
    with pytest.raises(ValueError, match="max_bytes=1 < min_bytes=2"):
        arena.set_limit("a", 2, 1)
    arena.set_limit("a", min_bytes=10 * LARGE)
    with pytest.raises(ValueError, match="more than the capacity"):
        arena.set_limit("b", min_bytes=7 * LARGE)
    with pytest.raises(ValueError, match="negative"):
        arena.set_limit("b", min_bytes=-1)
    arena.set_limit("a", min_bytes=9 * LARGE)
    arena.set_limit("b", min_bytes=7 * LARGE)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (1, LARGE),
        (0, GRANULE + 1),
        (0, 0),
        (0, 5 * LARGE),
        (4 * LARGE, GRANULE),
        (4 * LARGE, None),
        (3 * LARGE, 2 * LARGE),
        (-GRANULE, GRANULE),
        (0, -GRANULE),
    ],
)
def test_bad_ranges_are_the_callers_mistake(arena: ak.Arena, offset: int, size: int | None) -> None:
    region = arena.reserve(4 * LARGE, owner="a")
    for operation in (region.map, region.unmap):
        with pytest.raises(ValueError, match="bytes"):
            operation(offset, size)
    assert region.mapped_bytes == 0


@pytest.mark.parametrize("size", [0, 1, -1, GRANULE + 1])
def test_bad_sizes_are_the_callers_mistake(device: FaultyDevice, size: int) -> None:
    with pytest.raises(ValueError, match="capacity_bytes"):
        ak.Arena(device, capacity_bytes=size)
    with pytest.raises(ValueError, match="handle_bytes"):
        ak.Arena(device, capacity_bytes=GRANULE, handle_bytes=size)
    arena = ak.Arena(device, capacity_bytes=GRANULE)
    with pytest.raises(ValueError, match="size_bytes"):
        arena.reserve(size, owner="a")


def test_a_handle_is_at_most_the_capacity(device: FaultyDevice) -> None:
    with pytest.raises(ValueError, match="at most the capacity"):
        ak.Arena(device, capacity_bytes=GRANULE, handle_bytes=2 * GRANULE)


@pytest.mark.parametrize(
    ("capacity", "chosen"),
    [
        (GRANULE, GRANULE),
        (512 * MIB, GRANULE),
        (3 << 30, 8 * MIB),
        (24 << 30, 64 * MIB),
        (80 << 30, 128 * MIB),
    ],
)
def test_the_handle_size_is_chosen_from_the_capacity(
    device: FaultyDevice, capacity: int, chosen: int
) -> None:
    assert ak.Arena(device, capacity_bytes=capacity).handle_bytes == chosen


def test_mapping_what_is_mapped_is_refused(arena: ak.Arena) -> None:
    region = arena.reserve(4 * LARGE, owner="a")
    region.map(LARGE, 2 * LARGE)
    for offset, size in [(0, None), (LARGE, LARGE), (0, LARGE + GRANULE), (2 * LARGE, 2 * LARGE)]:
        with pytest.raises(ak.LifecycleError, match="mapped already"):
            region.map(offset, size)
    assert region.mapped_ranges() == [(LARGE, 2 * LARGE)]
    assert_ledger(arena)


def test_unmapping_what_is_not_mapped_is_refused(arena: ak.Arena) -> None:
    region = arena.reserve(4 * LARGE, owner="a")
    with pytest.raises(ak.LifecycleError, match="nothing is mapped"):
        region.unmap()
    region.map(LARGE, LARGE)
    for offset, size in [(0, 2 * LARGE), (LARGE, 2 * LARGE), (2 * LARGE, LARGE), (0, LARGE)]:
        with pytest.raises(ak.LifecycleError, match="not mapped"):
            region.unmap(offset, size)
    with pytest.raises(ak.LifecycleError, match="nothing is mapped"):
        region.unmap(2 * LARGE)
    assert region.mapped_ranges() == [(LARGE, LARGE)]


def test_use_after_close_is_refused(device: FaultyDevice, arena: ak.Arena) -> None:
    region = arena.reserve(4 * LARGE, owner="a")
    region.map()
    region.close()
    region.close()
    assert region.closed
    for operation in (region.map, region.unmap):
        with pytest.raises(ak.LifecycleError, match="closed"):
            operation()
    assert arena.stats().free_bytes == arena.capacity_bytes
    left_open = arena.reserve(LARGE, owner="b")
    left_open.map()
    arena.close()
    arena.close()
    assert left_open.closed
    with pytest.raises(ak.LifecycleError, match="closed"):
        arena.reserve(LARGE, owner="a")
    assert device.live == {}


def test_a_region_that_is_dropped_gives_its_memory_back(
    device: FaultyDevice, arena: ak.Arena
) -> None:
    region = arena.reserve(4 * LARGE, owner="a")
    region.map(contents="preserve")
    del region
    stats = assert_ledger(arena)
    assert (stats.owners, stats.num_regions) == ({}, 0)
    assert device.live == {"handles": 4}


def test_an_arena_outlives_its_wrapper_while_a_region_needs_it(
    device: FaultyDevice, device_bytes: DeviceBytes
) -> None:
    region = ak.Arena(device, capacity_bytes=LARGE, handle_bytes=LARGE).reserve(LARGE, owner="a")
    region.map()
    device_bytes.fill(region.address, 1, LARGE)
    del region
    device_bytes.close()
    assert device.live == {}


def test_context_managers_close(device: FaultyDevice) -> None:
    with ak.Arena(device, capacity_bytes=LARGE) as arena:
        with arena.reserve(LARGE, owner="a") as region:
            region.map()
        assert region.closed
    assert device.live == {}


def test_the_device_itself_may_run_out_before_the_capacity(device: FaultyDevice) -> None:
    arena = ak.Arena(device, capacity_bytes=8 * LARGE, handle_bytes=LARGE)
    region = arena.reserve(8 * LARGE, owner="a")
    device.fail_call(3, call="mem_create", code=2)
    with pytest.raises(ak.OutOfMemory) as caught:
        region.map()
    assert (caught.value.call, caught.value.bytes) == ("mem_create", LARGE)
    assert region.mapped_bytes == 0
    assert assert_ledger(arena).free_bytes == 8 * LARGE
    region.map()


def test_threads_share_an_arena(device: FaultyDevice, arena: ak.Arena) -> None:
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            region = arena.reserve(4 * LARGE, owner=name)
            for i in range(60):
                size = (i % 3 + 1) * LARGE + (i % 2) * GRANULE
                region.map(0, size)
                assert region.mapped_bytes == size
                assert_ledger(arena)
                region.unmap()
            region.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert assert_ledger(arena).owners == {}
    arena.close()
    assert device.live == {}
