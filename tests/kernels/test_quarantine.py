"""What could not be given back: kept from everybody, asked about again, and never lost."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from kernel_support import GRANULE, assert_ledger

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

SIZE = 4 * GRANULE
NOT_READY = 600
BROKEN = 719


class World:
    """An arena on a device that does not answer for a region that is dropped."""

    def __init__(self, device: FaultyDevice) -> None:
        self.device = device
        self.arena = ak.Arena(device, capacity_bytes=3 * SIZE, handle_bytes=2 * GRANULE)
        self.other = self.arena.reserve(SIZE, owner="other")
        code, self.stream = device._driver.stream_create()
        assert code == 0

    def drop_in_use(self, alias_set: bool = False) -> None:
        if alias_set:
            slots = self.arena.alias_set(SIZE, owners=["a", "b"])
            region = slots.region("a")
            slots.region("b").record(self.stream)
        else:
            region = self.arena.reserve(SIZE, owner="a")
            region.map()
        region.record(self.stream)
        self.device.fail_call(1, call="event_synchronize", code=BROKEN, persistent=True)
        slots = region = None
        gc.collect()
        assert assert_ledger(self.arena).quarantined_bytes == SIZE
        assert "mem_unmap" not in self.device.calls
        self.device.reset()

    def close(self) -> None:
        self.arena.close()
        assert self.device._driver.stream_destroy(self.stream) == 0
        self.other = None  # type: ignore[assignment]
        gc.collect()
        assert self.device.live == {}


@pytest.mark.parametrize("alias_set", [False, True])
@pytest.mark.parametrize("answer", [NOT_READY, BROKEN])
def test_memory_whose_work_could_not_be_waited_for_is_asked_about_again(
    device: FaultyDevice, alias_set: bool, answer: int
) -> None:
    world = World(device)
    world.drop_in_use(alias_set)
    for _ in range(3):
        device.reset()
        device.fail_call(1, call="event_query", code=answer, persistent=True)
        world.other.map(0, GRANULE)
        assert assert_ledger(world.arena).quarantined_bytes == SIZE
        assert device.calls["event_query"] <= 2
        assert not {"mem_unmap", "event_synchronize"} & device.calls.keys()
        world.other.unmap()
    with pytest.raises(ak.OutOfMemory, match="quarantined"):
        world.arena.reserve(3 * SIZE, owner="x").map()
    device.reset()
    world.other.map()
    assert "event_synchronize" not in device.calls, "nobody waits for it"
    assert assert_ledger(world.arena).quarantined_bytes == 0
    world.close()


@pytest.mark.parametrize("alias_set", [False, True])
def test_closing_the_arena_waits_for_it(device: FaultyDevice, alias_set: bool) -> None:
    world = World(device)
    world.other.close()  # what it does would ask the device
    world.drop_in_use(alias_set)
    device.fail_call(1, call="event_synchronize", code=BROKEN, persistent=True)
    for _ in range(2):
        with pytest.raises(ak.DriverError, match="event_synchronize"):
            world.arena.close()
        assert assert_ledger(world.arena).quarantined_bytes == SIZE
        assert "mem_unmap" not in device.calls
    device.reset()
    world.close()


def test_dropping_the_arena_waits_for_it(device: FaultyDevice) -> None:
    world = World(device)
    world.drop_in_use()
    del world.other, world.arena
    gc.collect()
    assert device.calls["event_synchronize"] == 1
    assert device._driver.stream_destroy(world.stream) == 0
    assert device.live == {}


def test_memory_that_the_device_never_answers_for_is_never_given_back(
    host: FaultyDevice, capfd: pytest.CaptureFixture[str]
) -> None:
    world = World(host)
    world.drop_in_use()
    host.fail_call(1, code=BROKEN, persistent=True)
    del world.other, world.arena
    gc.collect()
    assert "mem_unmap" not in host.calls
    assert host.live["mappings"] == 2
    assert "event_synchronize failed" in capfd.readouterr().err


@pytest.mark.parametrize("alias_set", [False, True])
def test_an_address_range_that_is_not_freed_is_freed_later(
    device: FaultyDevice, alias_set: bool
) -> None:
    world = World(device)
    for _ in range(3):
        device.fail_call(1, call="address_free", persistent=True)
        if alias_set:
            made: object = world.arena.alias_set(SIZE, owners=["a", "b"])
        else:
            made = world.arena.reserve(SIZE, owner="a")
        del made
        gc.collect()
        assert device.live["reservations"] > 1
        world.other.map()
        assert device.live["reservations"] > 1
        assert assert_ledger(world.arena).num_regions == 1
        device.reset()
        world.other.unmap()
        assert device.live["reservations"] == 1
    world.close()


def test_closing_the_arena_says_that_an_address_range_is_not_freed(device: FaultyDevice) -> None:
    world = World(device)
    world.other.close()
    region = world.arena.reserve(SIZE, owner="a")
    device.fail_call(1, call="address_free", persistent=True)
    del region
    gc.collect()
    for _ in range(2):
        with pytest.raises(ak.DriverError, match="address_free of 8 MiB"):
            world.arena.close()
    device.reset()
    world.close()


def test_the_range_of_abandoned_views_is_freed_later_too(host: FaultyDevice) -> None:
    world = World(host)
    region = world.arena.reserve(SIZE, owner="a")
    region.map()
    view = region.numpy((SIZE,), np.uint8)
    region.close(abandon_views=True)
    host.fail_call(1, call="address_free", persistent=True)
    del region, view
    gc.collect()
    assert host.live["reservations"] == 2
    host.reset()
    world.other.map()
    assert host.live["reservations"] == 1
    world.close()


def test_a_range_waits_for_what_is_stuck_in_it(host: FaultyDevice) -> None:
    world = World(host)
    region = world.arena.reserve(SIZE, owner="a")
    region.map()
    host.fail_call(1, call="mem_unmap", persistent=True)
    del region
    gc.collect()
    assert "address_free" not in host.calls
    world.other.map(0, GRANULE)
    assert "address_free" not in host.calls
    assert assert_ledger(world.arena).quarantined_bytes == SIZE
    host.reset()
    world.other.map(GRANULE, GRANULE)
    assert host.calls["address_free"] == 1
    assert assert_ledger(world.arena).quarantined_bytes == 0
    world.close()


def test_only_what_was_there_before_the_plan_is_lost(host: FaultyDevice) -> None:
    """What the plan maps itself and loses on the way back held nobody's bytes."""
    all_lost: list[ak.RegionRange] = []
    for n in range(1, 100):
        arena = ak.Arena(host, capacity_bytes=4 * SIZE, handle_bytes=2 * GRANULE)
        region = arena.reserve(4 * SIZE, owner="a")
        region.map(0, SIZE)
        other = arena.reserve(SIZE, owner="b")
        host.reset()
        host.fail_call(n, persistent=True)
        try:
            with arena.transaction() as tx:
                tx.map(region, SIZE, SIZE)
                tx.unmap(region, SIZE, GRANULE * 2)
                tx.map(region, SIZE, GRANULE * 2)
                tx.unmap(region)
                tx.map(region, 2 * SIZE, SIZE, contents="poison")
                tx.map(other)
        except ak.DriverError as error:
            all_lost += error.lost_contents
            host.reset()
            arena.close()
            continue
        host.reset()
        arena.close()
        break
    assert n > 10
    assert len(all_lost) > 3
    assert {lost.owner for lost in all_lost} == {"a"}
    assert max(lost.offset_bytes + lost.size_bytes for lost in all_lost) <= SIZE
