"""Read-only mappings: who may write to them, and until when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kernel_support import GRANULE, open_device
from prefetch_support import SOON, until

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

LARGE = 2 * GRANULE
PARTS = 4
NOT_READY = 600


@pytest.fixture(params=["host", "stub"])  # on a GPU an illegal access is an error that sticks
def device(request: pytest.FixtureRequest) -> FaultyDevice:
    return FaultyDevice(open_device(request.param, request))


class World:
    """A region of PARTS large handles, of which the last is not mapped, read-only throughout."""

    def __init__(self, device: FaultyDevice) -> None:
        self.device = device
        self.arena = ak.Arena(device, capacity_bytes=2 * PARTS * LARGE, handle_bytes=LARGE)
        self.region = self.arena.reserve(PARTS * LARGE, owner="a")
        self.region.map(0, (PARTS - 1) * LARGE, read_only=True)
        self.image = ak.HostImage.allocate(PARTS * LARGE, device=device)
        self.prefetcher = ak.Prefetcher(device, chunk_bytes=GRANULE)
        self.stream = self.new_stream()
        self.probe = self.new_stream()

    def new_stream(self) -> int:
        code, stream = self.device._driver.stream_create()
        assert code == 0
        return int(stream)

    def writable(self) -> list[int]:
        """The mapped parts that can be written at the moment, in their first and last granule."""
        driver, parts = self.device._driver, []
        for offset, size in self.region.mapped_ranges():
            for at in range(offset, offset + size, LARGE):
                address = self.region.address + at
                codes = {
                    driver.memcpy_d2d_async(address + i * GRANULE, address + 8, 1, self.probe)
                    for i in (0, 1)
                }
                assert len(codes) == 1, "a handle has one access"
                if codes == {0}:
                    parts.append(at // LARGE)
        driver.stream_synchronize(self.probe)
        return parts

    @contextmanager
    def loading(self, *parts: int, window: bool = True) -> Iterator[ak.Ticket]:
        """A load of these parts, by two pieces each, that is not over before the block is."""
        order = [(p * LARGE + at, GRANULE // 2) for at in (GRANULE, 4096) for p in parts]
        self.device.fail_call(1, call="event_query", code=NOT_READY, persistent=True)
        load = self.prefetcher.load
        if window:
            with self.region.writable():
                ticket = load(self.image, self.region, order=order, after=self.stream)
        else:
            ticket = load(self.image, self.region, order=order, after=self.stream)
        try:
            yield ticket
        finally:
            self.device.reset()
            ticket.wait(SOON)

    def close(self) -> None:
        self.prefetcher.close()
        self.arena.close()
        for stream in (self.stream, self.probe):
            assert self.device._driver.stream_destroy(stream) == 0


@pytest.fixture
def world(device: FaultyDevice) -> Iterator[World]:
    world = World(device)
    yield world
    world.close()


def test_a_window_opens_all_and_its_end_closes_all(world: World) -> None:
    assert world.writable() == []
    with world.region.writable():
        assert world.writable() == [0, 1, 2]
        with world.region.writable():
            world.region.map(3 * LARGE, LARGE, read_only=True)
        assert world.writable() == [0, 1, 2, 3]
    assert world.writable() == []
    assert world.region.read_only_ranges() == [(0, 4 * LARGE)]


def test_a_transfer_keeps_open_only_what_it_writes(world: World) -> None:
    region = world.region
    with world.loading(0, 1):
        assert world.writable() == [0, 1]
        region.map(3 * LARGE, LARGE, read_only=True)
        assert world.writable() == [0, 1]
        with region.writable():
            assert world.writable() == [0, 1, 2, 3]
        assert world.writable() == [0, 1]
        region.protect(2 * LARGE, LARGE, read_only=False)
        assert world.writable() == [0, 1, 2]
        region.protect(2 * LARGE, LARGE)
        assert world.writable() == [0, 1]
    assert world.writable() == []


def test_the_later_of_two_transfers_ends_the_access(world: World) -> None:
    with world.loading(0, 1) as first:
        with world.region.writable():
            second = world.prefetcher.load(
                world.image, world.region, order=[(LARGE, LARGE), (2 * LARGE, LARGE)]
            )
        second.wait(SOON)
        assert world.writable() == [0, 1]
        assert not first.done
    assert world.writable() == []


def test_another_transfer_needs_a_window_of_its_own(world: World) -> None:
    region = world.region
    with world.loading(1):
        for order in ([(LARGE, GRANULE)], [(0, GRANULE)]):
            with pytest.raises(ak.LifecycleError, match="read-only"):
                world.prefetcher.load(world.image, region, order=order)
        with pytest.raises(ak.LifecycleError, match="read-only"):
            region.copy_from(b"abc", LARGE)
        with region.writable():
            region.copy_from(b"abc", LARGE)
        region.copy_to(bytearray(3), LARGE)
        assert world.writable() == [1]


def test_protecting_what_is_written_takes_effect_when_the_transfer_ends(world: World) -> None:
    world.region.protect(read_only=False)
    with world.loading(1, window=False):
        world.region.protect()
        assert world.writable() == [1]
    assert world.writable() == []


def test_the_end_of_a_transfer_leaves_alone_what_is_being_filled(
    world: World, device: FaultyDevice
) -> None:
    region, failures = world.region, []

    def map_another() -> None:
        try:
            region.map(3 * LARGE, LARGE, contents="poison", read_only=True)
        except ak.Error as error:
            failures.append(error)

    mapping = threading.Thread(target=map_another)
    with world.loading(0) as ticket:
        with device.holding("memset_async"):
            mapping.start()
            until(lambda: device.calls.get("memset_async"))
            device.reset()
            ticket.wait(SOON)
            until(lambda: "mem_set_access" in device.calls)
        mapping.join()
    assert failures == []
    assert world.writable() == []
    found = bytearray(4)
    region.copy_to(found, 3 * LARGE)
    assert found == b"\xff" * 4


def test_a_failure_at_the_end_of_a_transfer_is_made_good_by_the_next_window(
    world: World, device: FaultyDevice
) -> None:
    with world.loading(0) as ticket:
        device.reset()
        device.fail_call(1, call="mem_set_access")
        ticket.wait(SOON)
        until(lambda: "mem_set_access" in device.calls)
    assert world.writable() == [0]
    with pytest.raises(ak.LifecycleError, match="read-only"):
        world.region.copy_from(b"abc")
    with world.region.writable():
        pass
    assert world.writable() == []
