"""SimulatedDevice: exact times, and bytes that move only for those who waited for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from kernel_support import GRANULE, pattern

import aegaeon_kernels as ak
from aegaeon_kernels.testing import SimulatedDevice, assert_bitwise_equal

RATE = 1e9  # bytes/s
SIZE = 1_000_000  # a millisecond
MS = 1e-3
GONE = 700  # the code of a copy that met no memory


class Bench:
    def __init__(self) -> None:
        self.device = SimulatedDevice(memory_bytes=16 * GRANULE, bytes_per_s=RATE)
        self.driver = self.device._driver
        self.arena = ak.Arena(self.device, capacity_bytes=16 * GRANULE)
        self.region = self.arena.reserve(2 * GRANULE, owner="a")
        self.region.map()
        self.address = self.region.address
        self.image = ak.HostImage.allocate(4 * SIZE, device=self.device)
        self.host = np.frombuffer(self.image, np.uint8)
        self.host[:] = pattern(4 * SIZE, seed=3)
        self.memory = np.asarray(_View(self.address, 2 * GRANULE))
        self.memory[:] = 0

    def stream(self) -> int:
        code, stream = self.driver.stream_create()
        assert code == 0
        return stream

    def event(self, stream: int) -> int:
        code, event = self.driver.event_create()
        assert code == 0
        assert self.driver.event_record(event, stream) == 0
        return event

    def load(self, stream: int, offset: int = 0, size: int = SIZE) -> int:
        return self.driver.memcpy_h2d_async(
            self.address + offset, self.image.address + offset, size, stream
        )

    def store(self, stream: int, offset: int = 0, size: int = SIZE) -> int:
        return self.driver.memcpy_d2h_async(
            self.image.address + offset, self.address + offset, size, stream
        )

    def loaded(self, size: int = SIZE) -> bool:
        return bool((self.memory[:size] == self.host[:size]).all())


class _View:
    """The device's memory as it is at this moment, without asking the device."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.arena.close()


def test_bytes_move_when_somebody_has_waited(bench: Bench) -> None:
    stream = bench.stream()
    assert bench.load(stream) == 0
    assert not bench.memory.any()
    assert bench.device.now_s == 0
    assert bench.driver.stream_synchronize(stream) == 0
    assert bench.loaded()
    assert bench.device.now_s == pytest.approx(1 * MS)


def test_bytes_are_those_of_the_source_at_the_last_moment(bench: Bench) -> None:
    stream = bench.stream()
    bench.load(stream)
    bench.host[:SIZE] = 9  # too early
    bench.driver.stream_synchronize(stream)
    assert (bench.memory[:SIZE] == 9).all()


def test_waiting_for_one_stream_completes_no_other(bench: Bench) -> None:
    first, second = bench.stream(), bench.stream()
    bench.load(first)
    bench.store(second, offset=SIZE, size=3 * SIZE)
    before = bench.host[SIZE:].copy()
    bench.driver.stream_synchronize(second)
    assert bench.device.now_s == pytest.approx(3 * MS)
    assert not bench.host[SIZE:].any()
    assert not bench.memory.any(), "two milliseconds late, and still legal"
    bench.driver.stream_synchronize(first)
    assert bench.device.now_s == pytest.approx(3 * MS), "it was over by then"
    assert bench.loaded()
    assert before.any()


def test_an_event_completes_what_comes_before_it_only(bench: Bench) -> None:
    stream = bench.stream()
    bench.load(stream)
    event = bench.event(stream)
    bench.load(stream, offset=SIZE)
    assert bench.driver.event_synchronize(event) == 0
    assert bench.loaded()
    assert not bench.memory[SIZE : 2 * SIZE].any()
    assert bench.device.now_s == pytest.approx(1 * MS)


def test_a_query_says_yes_when_it_is_time_and_polling_passes_time(bench: Bench) -> None:
    stream = bench.stream()
    event = bench.event(stream)
    assert bench.driver.event_query(event) == 0, "nothing came before it"
    bench.load(stream)
    event = bench.event(stream)
    assert bench.driver.event_query(event) == 600
    bench.device.advance(0.9 * MS)
    assert bench.driver.event_query(event) == 600
    assert not bench.memory.any()
    while bench.driver.event_query(event) == 600:
        assert bench.device.now_s < 1.1 * MS
    assert bench.loaded()


def test_a_stream_that_waits_for_an_event_is_ordered_behind_it(bench: Bench) -> None:
    first, second = bench.stream(), bench.stream()
    bench.device.compute(first, 5 * MS)
    bench.load(first)
    event = bench.event(first)
    bench.driver.stream_wait_event(second, event)
    bench.store(second, offset=0)
    bench.driver.memset_async(bench.address, 1, SIZE, second)
    expected = bench.host[:SIZE].copy()
    bench.driver.stream_synchronize(second)
    assert bench.device.now_s == pytest.approx(7 * MS)
    assert_bitwise_equal(bench.host[:SIZE], expected)
    assert (bench.memory[:SIZE] == 1).all()


def test_without_that_wait_the_order_is_the_worst(bench: Bench) -> None:
    first, second = bench.stream(), bench.stream()
    bench.load(first)
    bench.store(second, offset=0)
    bench.driver.stream_synchronize(second)
    assert not bench.host[:SIZE].any(), "the store overtook the load"


def test_engines_serve_copies_in_order_of_submission_each_direction_alone(bench: Bench) -> None:
    streams = [bench.stream() for _ in range(3)]
    bench.load(streams[0])
    bench.load(streams[1], offset=SIZE, size=2 * SIZE)
    bench.store(streams[2])
    copies = bench.device.copies
    assert [copy.call for copy in copies] == ["memcpy_h2d_async"] * 2 + ["memcpy_d2h_async"]
    assert [copy.begin_s for copy in copies] == pytest.approx([0, 1 * MS, 0])
    assert [copy.end_s for copy in copies] == pytest.approx([1 * MS, 3 * MS, 1 * MS])
    assert copies[1].device_address == bench.address + SIZE
    assert copies[1].size_bytes == 2 * SIZE


def test_overhead_and_wake_latency_take_their_time() -> None:
    device = SimulatedDevice(
        memory_bytes=GRANULE, bytes_per_s=RATE, copy_overhead_s=2 * MS, wake_latency_s=0.5 * MS
    )
    driver = device._driver
    with ak.Arena(device, capacity_bytes=GRANULE) as arena:
        region = arena.reserve(GRANULE, owner="a")
        region.map()
        image = ak.HostImage.allocate(SIZE, device=device)
        _, stream = driver.stream_create()
        driver.memcpy_h2d_async(region.address, image.address, SIZE, stream)
        driver.memcpy_h2d_async(region.address, image.address, SIZE, stream)
        driver.stream_synchronize(stream)
        assert device.now_s == pytest.approx(6.5 * MS)
        driver.stream_synchronize(stream)
        assert device.now_s == pytest.approx(6.5 * MS), "there was nothing to wait for"


def test_a_held_clock_holds_those_who_wait(bench: Bench) -> None:
    stream = bench.stream()
    bench.load(stream)
    waiter = threading.Thread(target=bench.driver.stream_synchronize, args=(stream,))
    with bench.device.clock_limit(0.7 * MS) as clock:
        waiter.start()
        clock.reach()
        assert bench.device.now_s == pytest.approx(0.7 * MS)
        waiter.join(0.02)
        assert waiter.is_alive()
        assert not bench.memory.any()
    waiter.join(20)
    assert bench.loaded()


def unmap(bench: Bench) -> None:
    bench.region.unmap()


def free_the_image(bench: Bench) -> None:
    bench.host = np.zeros(0, np.uint8)
    del bench.image


@pytest.mark.parametrize("lose", [unmap, free_the_image])
def test_a_copy_that_meets_no_memory_breaks_the_device_for_good(bench: Bench, lose: object) -> None:
    stream = bench.stream()
    bench.load(stream)
    event = bench.event(stream)
    lose(bench)  # type: ignore[operator]
    assert bench.driver.stream_synchronize(stream) == GONE
    for code in (
        bench.driver.event_synchronize(event),
        bench.driver.event_query(event),
        bench.driver.stream_synchronize(stream),
        bench.driver.memset_async(bench.address, 0, 1, stream),
    ):
        assert code == GONE
    assert "gone" in bench.driver.describe(GONE)


def test_what_is_unknown_is_refused(bench: Bench) -> None:
    assert bench.load(999) == 400
    assert bench.driver.stream_synchronize(999) == 400
    assert bench.driver.event_query(999) == 400
    stream = bench.stream()
    assert bench.driver.stream_destroy(stream) == 0
    assert bench.driver.stream_destroy(stream) == 400
    with pytest.raises(ValueError, match="999"):
        bench.device.compute(999, 1.0)


@pytest.mark.parametrize(
    "options", [{"bytes_per_s": 0}, {"copy_overhead_s": -1.0}, {"wake_latency_s": -1.0}]
)
def test_impossible_links_are_the_callers_mistake(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        SimulatedDevice(memory_bytes=GRANULE, **options)
