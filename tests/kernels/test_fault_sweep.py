"""Every driver call of every operation fails once: the n-th, for every n.

After a single failure the state is exactly as before. While the driver keeps failing the way back
fails too; then memory is quarantined, the ledger holds, nobody else's bytes are touched, and all
heals once the driver works again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import pytest
from kernel_support import GRANULE, DeviceBytes, assert_ledger, pattern

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

LARGE = 2 * GRANULE
CAPACITY = 7 * LARGE
OWNERS = ("s", "t", "u")
WAIT_S = 20.0


class World:
    """A neighbour with bytes to lose, and a region with holes, heads and tails to operate on.

    All free memory is large handles, so that a tail has to convert one.
    """

    def __init__(
        self, device: FaultyDevice, bytes_of: DeviceBytes, slots: Sequence[bool] = ()
    ) -> None:
        """slots: alias sets that it has, in debug mode or not."""
        self.device = device
        self.bytes_of = bytes_of
        self.arena = ak.Arena(device, capacity_bytes=CAPACITY, handle_bytes=LARGE)
        self.neighbour = self.arena.reserve(LARGE, owner="neighbour")
        self.neighbour.map()
        self.neighbours_data = pattern(LARGE, seed=1)
        bytes_of.write(self.neighbour.address, self.neighbours_data)
        self.region = self.arena.reserve(8 * LARGE, owner="a", tag="weights")
        self.region.map(GRANULE, GRANULE)
        self.region.map(2 * LARGE, LARGE + GRANULE)
        self.data = {
            offset: pattern(size, seed=offset) for offset, size in self.region.mapped_ranges()
        }
        for offset, data in self.data.items():
            bytes_of.write(self.region.address + offset, data)
        self.slots = [self.arena.alias_set(LARGE, owners=OWNERS, debug=debug) for debug in slots]
        for each in self.slots:
            bytes_of.fill(each.region("s").address, 5, LARGE)
        with self.arena.reserve(CAPACITY, owner="filler") as filler:
            filler.map(0, self.arena.stats().free_bytes)
        self.image = ak.HostImage.allocate(3 * LARGE, device=device)
        self.prefetcher = ak.Prefetcher(device, chunk_bytes=GRANULE // 2, depth=2)
        self.order = [(2 * LARGE + GRANULE, GRANULE), (GRANULE, GRANULE // 4)]
        self.made: object = None  # by the operation

    def state(self) -> tuple[object, ...]:
        stats = assert_ledger(self.arena)
        region = self.region
        return (
            dict(stats.owners),
            stats.free_bytes,
            stats.quarantined_bytes,
            stats.num_regions,
            region.mapped_ranges(),
            region.mapped_bytes,
            region.closed,
            region.address,
            [
                (slot.owner, slot.region(owner).mapped_ranges(), slot.region(owner).address)
                for slot in self.slots
                for owner in OWNERS
            ],
        )

    def check_neighbour(self) -> None:
        found = self.bytes_of.read(self.neighbour.address, LARGE)
        assert_bitwise_equal(found, self.neighbours_data, what="neighbour")

    def check_own_bytes(self) -> None:
        for offset, data in self.data.items():
            found = self.bytes_of.read(self.region.address + offset, len(data))
            assert_bitwise_equal(found, data, what=f"own bytes at {offset}")

    def check_slots(self, error: ak.DriverError) -> None:
        """The slots are their first owner's still, with its bytes where they are not lost."""
        for slot in self.slots:
            assert slot.owner == "s"
            if not any(lost.owner == "s" for lost in error.lost_contents):
                assert (self.bytes_of.read(slot.region("s").address, LARGE) == 5).all()

    def close(self) -> None:
        self.prefetcher.close()
        for slot in self.slots:
            slot.close()
        if isinstance(self.made, ak.AliasSet):
            self.made.close()
        self.arena.close()
        self.image = self.made = None  # type: ignore[assignment]
        if self.device.live != {"streams": 1}:
            gc.collect()  # caught exceptions keep frames, and these what they had made
        assert self.device.live == {"streams": 1}, "only the test's own stream may be left"


def reserve(world: World) -> None:
    world.made = world.arena.reserve(LARGE, owner="new")


def map_with_head_and_tail_by_conversion(world: World) -> None:
    world.region.map(4 * LARGE + GRANULE, 3 * LARGE)


def unmap_everything(world: World) -> None:
    world.region.unmap()


def unmap_one_run(world: World) -> None:
    world.region.unmap(2 * LARGE, LARGE)


def close_region(world: World) -> None:
    world.region.close()


def load(world: World) -> None:
    world.prefetcher.load(world.image, world.region, order=world.order).wait(WAIT_S)


def store(world: World) -> None:
    world.prefetcher.store(world.region, world.image, order=world.order).wait(WAIT_S)


def open_a_prefetcher(world: World) -> None:
    world.made = ak.Prefetcher(world.device, depth=3)


def allocate_an_image(world: World) -> None:
    world.made = ak.HostImage.allocate(12345, device=world.device)


def make_an_alias_set(world: World) -> None:
    world.made = world.arena.alias_set(LARGE + GRANULE, owners=OWNERS)


def make_a_debug_alias_set(world: World) -> None:
    world.made = world.arena.alias_set(LARGE + GRANULE, owners=OWNERS, debug=True)


def give_a_slot(world: World) -> None:
    world.slots[0].give("t", contents="poison")


def give_a_slot_in_debug_mode(world: World) -> None:
    world.slots[0].give("t", contents="poison")


SLOTS = {give_a_slot: [False], give_a_slot_in_debug_mode: [True]}


# With the call that each must at least have made, so that the sweep sweeps what it says.
OPERATIONS: dict[Callable[[World], None], str] = {
    reserve: "address_reserve",
    map_with_head_and_tail_by_conversion: "mem_release",
    unmap_everything: "mem_unmap",
    unmap_one_run: "mem_unmap",
    close_region: "address_free",
    load: "memcpy_h2d_async",
    store: "memcpy_d2h_async",
    open_a_prefetcher: "event_create",
    allocate_an_image: "host_alloc",
    make_an_alias_set: "mem_map",
    make_a_debug_alias_set: "mem_map",
    give_a_slot: "memset_async",
    give_a_slot_in_debug_mode: "mem_unmap",
}
LASTING = [reserve, map_with_head_and_tail_by_conversion, unmap_everything, unmap_one_run]
LASTING += [close_region, load, store]
LASTING += [make_an_alias_set, make_a_debug_alias_set, give_a_slot, give_a_slot_in_debug_mode]


WorldOf = Callable[[Sequence[bool]], World]


def failures(
    device: FaultyDevice,
    operation: Callable[[World], None],
    world_of: WorldOf,
    code: int,
    persistent: bool,
) -> Iterator[tuple[World, tuple[object, ...], ak.Error]]:
    """Worlds in which the n-th driver call of the operation has just failed, for every n."""
    for n in range(1, 200):
        world = world_of(SLOTS.get(operation, []))
        before = world.state()
        device.reset()
        device.fail_call(n, code=code, persistent=persistent)
        try:
            operation(world)
        except ak.Error as error:
            calls = device.calls
            device.reset()
            assert sum(calls.values()) >= n
            yield world, before, error
            world.close()
        else:
            calls = device.calls
            device.reset()
            world.close()
            assert sum(calls.values()) < n, f"a failed call went unnoticed: {calls}"
            assert n > 1
            assert OPERATIONS[operation] in calls
            return
    raise AssertionError("the operation never runs out of driver calls")


@pytest.fixture
def world_of(device: FaultyDevice, device_bytes: DeviceBytes) -> WorldOf:
    return lambda slots: World(device, device_bytes, slots)


@pytest.mark.parametrize("code", [2, 719])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_one_failure_leaves_the_state_as_before(
    device: FaultyDevice,
    world_of: WorldOf,
    operation: Callable[[World], None],
    code: int,
) -> None:
    num_failures = 0
    for world, before, error in failures(device, operation, world_of, code, persistent=False):
        assert isinstance(error, ak.OutOfMemory if code == 2 else ak.DriverError)
        assert error.code == code
        assert world.state() == before
        world.check_neighbour()
        if operation is not load:
            world.check_own_bytes()
        world.check_slots(error)
        operation(world)  # and now it works
        world.check_neighbour()
        num_failures += 1
    assert num_failures >= 1


@pytest.mark.parametrize("operation", LASTING, ids=lambda operation: operation.__name__)
def test_a_driver_that_keeps_failing_costs_nobody_else(
    device: FaultyDevice, world_of: WorldOf, operation: Callable[[World], None]
) -> None:
    for world, _before, error in failures(device, operation, world_of, 719, persistent=True):
        assert isinstance(error, ak.DriverError)
        stats = assert_ledger(world.arena)
        assert stats.owners[("neighbour", "")] == LARGE
        world.check_neighbour()
        if operation in (load, store):
            continue
        for slot in world.slots:
            assert slot.owner == "s"
            slot.give("t")
            slot.give("s")
            assert slot.region("s").mapped_bytes == LARGE
        region = world.region
        if not region.closed:
            # Whatever was quarantined comes back by itself.
            if region.mapped_bytes:
                region.unmap()
            region.map(GRANULE, 5 * LARGE)
            assert assert_ledger(world.arena).quarantined_bytes == 0
            world.bytes_of.fill(region.address + GRANULE, 3, 5 * LARGE)
        world.check_neighbour()


@pytest.mark.parametrize("persistent", [False, True])
def test_closing_an_arena_may_be_tried_again(
    device: FaultyDevice, device_bytes: DeviceBytes, persistent: bool
) -> None:
    num_failures = 0
    for n in range(1, 100):
        world = World(device, device_bytes)
        world.region.unmap(2 * LARGE)  # some free handles
        device.reset()
        device.fail_call(n, persistent=persistent)
        try:
            world.arena.close()
        except ak.DriverError:
            num_failures += 1
            device.reset()
            assert_ledger(world.arena)
            world.arena.close()
            world.close()
            continue
        assert device.num_calls < n
        device.reset()
        world.close()
        assert num_failures >= 8
        return


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_closing_an_alias_set_may_be_tried_again(
    device: FaultyDevice, device_bytes: DeviceBytes, persistent: bool, strict: bool
) -> None:
    num_failures = 0
    for n in range(1, 100):
        world = World(device, device_bytes, [strict])
        slots = world.slots[0]
        slots.give("u")
        device.reset()
        device.fail_call(n, persistent=persistent)
        try:
            slots.close()
        except ak.DriverError:
            num_failures += 1
            device.reset()
            assert_ledger(world.arena)
            world.check_neighbour()
            with pytest.raises(ak.LifecycleError, match="closed"):
                slots.give("t")
            world.close()
            continue
        assert device.num_calls < n
        device.reset()
        world.close()
        break
    assert num_failures >= 4


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_dropping_an_alias_set_costs_nothing_for_good(
    device: FaultyDevice, device_bytes: DeviceBytes, persistent: bool, strict: bool
) -> None:
    for n in range(1, 100):
        world = World(device, device_bytes)
        before, live = world.state(), device.live
        slots = world.arena.alias_set(LARGE + GRANULE, owners=OWNERS, debug=strict)
        slots.region("t").record(device_bytes.stream)
        slots.give("t")
        device.reset()
        device.fail_call(n, persistent=persistent)
        del slots
        num_calls = device.num_calls
        device.reset()
        assert_ledger(world.arena)
        assert world.arena.check([]) is None  # heals
        assert world.state() == before
        for kind in ("mappings", "reservations"):
            assert device.live[kind] == live[kind]
        world.close()
        if num_calls < n:
            break
    assert n > 4


def test_closing_a_prefetcher_may_be_tried_again(host: FaultyDevice) -> None:
    for n in range(1, 100):
        prefetcher = ak.Prefetcher(host)
        host.reset()
        host.fail_call(n, persistent=True)
        try:
            prefetcher.close()
        except ak.DriverError:
            host.reset()
            prefetcher.close()
        else:
            assert host.num_calls < n
            host.reset()
            break
        assert host.live == {}
    assert n > 4
