"""CUDA's virtual memory rules, one by one, on every driver."""

from __future__ import annotations

import ctypes
import mmap
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_support import DEVICES, GRANULE, MIB, DeviceBytes, open_device, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

OK, INVALID_VALUE, OUT_OF_MEMORY, INVALID_HANDLE = 0, 1, 2, 400
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
NONE, READ, READWRITE = _C.Access.NONE, _C.Access.READ, _C.Access.READWRITE


@pytest.fixture(params=[*DEVICES, "host without page table moves"])
def device(request: pytest.FixtureRequest) -> FaultyDevice:
    if request.param in ("host", "stub", "cuda"):
        return FaultyDevice(open_device(request.param, request))
    device = ak.Device("host", memory_bytes=1)
    device._driver = _C.make_host_driver(capacity_bytes=1024 * MIB, move_page_tables=False)
    return FaultyDevice(device)


@pytest.fixture
def driver(device: FaultyDevice) -> _C.Driver:
    assert device.granularity_bytes == GRANULE
    return device._driver


class Memory:
    """Handles and reservations that are undone at the end of a test."""

    def __init__(self, driver: _C.Driver) -> None:
        self.driver = driver
        self._handles: list[int] = []
        self._ranges: list[tuple[int, int]] = []

    def create(self, size: int = GRANULE) -> int:
        code, handle = self.driver.mem_create(size)
        assert code == OK
        self._handles.append(handle)
        return handle

    def reserve(self, size: int) -> int:
        code, address = self.driver.address_reserve(size, 0)
        assert code == OK
        assert address % GRANULE == 0
        self._ranges.append((address, size))
        return address

    def map(self, address: int, handle: int, size: int = GRANULE) -> None:
        assert self.driver.mem_map(address, size, 0, handle) == OK

    def close(self) -> None:
        for address, size in self._ranges:
            for at in range(address, address + size, GRANULE):
                for length in range(GRANULE, address + size - at + GRANULE, GRANULE):
                    if self.driver.mem_unmap(at, length) == OK:
                        break
            assert self.driver.address_free(address, size) in (OK, INVALID_VALUE)
        for handle in self._handles:
            self.driver.mem_release(handle)


@pytest.fixture
def memory(device: FaultyDevice) -> Iterator[Memory]:
    memory = Memory(device._driver)
    yield memory
    memory.close()
    live = device.live
    live.pop("streams", None)  # device_bytes' own
    assert live == {}, "the test did not undo what it did"


@pytest.mark.parametrize("size", [0, 1, MIB, GRANULE + 1, GRANULE + 4096])
def test_create_takes_multiples_of_the_granularity(driver: _C.Driver, size: int) -> None:
    assert driver.mem_create(size)[0] == INVALID_VALUE


def test_creating_beyond_the_capacity_is_out_of_memory(driver: _C.Driver, memory: Memory) -> None:
    free, total = driver.memory_info()
    if total > 4 << 30:
        pytest.skip("would take all of a real GPU")
    handles = [memory.create(free // 4) for _ in range(4)]
    assert driver.memory_info()[0] == 0
    assert driver.mem_create(GRANULE)[0] == OUT_OF_MEMORY
    assert driver.mem_release(handles[0]) == OK
    memory.create(GRANULE)


def test_releasing_a_handle_twice_is_refused(driver: _C.Driver, memory: Memory) -> None:
    handle = memory.create()
    assert driver.mem_release(handle) == OK
    if driver.kind == "host":  # a CUDA driver may have given the number to somebody else
        assert driver.mem_release(handle) == INVALID_VALUE
        assert driver.mem_release(12345678) == INVALID_VALUE


def test_a_released_handle_lives_until_it_is_unmapped(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    address, handle = memory.reserve(GRANULE), memory.create()
    free = driver.memory_info()[0]
    memory.map(address, handle)
    assert driver.mem_set_access(address, GRANULE, READWRITE) == OK
    assert driver.mem_release(handle) == OK
    assert driver.memory_info()[0] <= free
    device_bytes.fill(address, 9, GRANULE)
    assert (device_bytes.read(address, GRANULE) == 9).all()
    assert driver.mem_map(address, GRANULE, 0, handle) == INVALID_VALUE, "released: no new mapping"
    assert driver.mem_unmap(address, GRANULE) == OK
    assert driver.memory_info()[0] >= free + GRANULE


def test_a_handle_is_mapped_whole_at_offset_zero(driver: _C.Driver, memory: Memory) -> None:
    address, handle = memory.reserve(4 * GRANULE), memory.create(2 * GRANULE)
    assert driver.mem_map(address, GRANULE, 0, handle) == INVALID_VALUE
    assert driver.mem_map(address, GRANULE, GRANULE, handle) == INVALID_VALUE
    assert driver.mem_map(address, 2 * GRANULE, GRANULE, handle) == INVALID_VALUE
    assert driver.mem_map(address, 4 * GRANULE, 0, handle) == INVALID_VALUE
    assert driver.mem_map(address, 2 * GRANULE, 0, handle) == OK


def test_a_mapping_lies_inside_one_reservation(driver: _C.Driver, memory: Memory) -> None:
    address, handle = memory.reserve(2 * GRANULE), memory.create(2 * GRANULE)
    assert driver.mem_map(address + GRANULE, 2 * GRANULE, 0, handle) == INVALID_VALUE
    assert driver.mem_map(address + 4096, 2 * GRANULE, 0, handle) == INVALID_VALUE
    assert driver.mem_map(GRANULE, 2 * GRANULE, 0, handle) == INVALID_VALUE


@pytest.mark.parametrize("first", [0, 1, 2])
def test_no_address_is_mapped_twice(driver: _C.Driver, memory: Memory, first: int) -> None:
    address = memory.reserve(4 * GRANULE)
    memory.map(address + GRANULE, memory.create(2 * GRANULE), 2 * GRANULE)
    other = memory.create(2 * GRANULE)
    assert driver.mem_map(address + first * GRANULE, 2 * GRANULE, 0, other) == INVALID_VALUE


def test_set_access_takes_a_fully_mapped_range_of_whole_handles(
    driver: _C.Driver, memory: Memory
) -> None:
    address = memory.reserve(6 * GRANULE)
    memory.map(address, memory.create(2 * GRANULE), 2 * GRANULE)
    memory.map(address + 2 * GRANULE, memory.create())
    memory.map(address + 4 * GRANULE, memory.create())
    assert driver.mem_set_access(address, 4 * GRANULE, READWRITE) == INVALID_VALUE, "a hole"
    assert driver.mem_set_access(address, 5 * GRANULE, READWRITE) == INVALID_VALUE, "a hole inside"
    assert driver.mem_set_access(address + 5 * GRANULE, GRANULE, READ) == INVALID_VALUE
    assert driver.mem_set_access(address, 3 * GRANULE, READWRITE) == OK, "one call for two handles"
    assert driver.mem_set_access(address + 4 * GRANULE, GRANULE, READWRITE) == OK


def test_unmap_takes_runs_of_whole_mappings(
    driver: _C.Driver, memory: Memory, device: FaultyDevice
) -> None:
    address = memory.reserve(6 * GRANULE)
    memory.map(address, memory.create(2 * GRANULE), 2 * GRANULE)
    memory.map(address + 2 * GRANULE, memory.create())
    memory.map(address + 4 * GRANULE, memory.create())
    for begin, size in [(0, 1), (1, 1), (1, 2), (0, 4), (0, 5), (3, 1), (5, 1)]:
        code = driver.mem_unmap(address + begin * GRANULE, size * GRANULE)
        assert code == INVALID_VALUE, (begin, size)
    assert device.live["mappings"] == 3
    assert driver.mem_unmap(address, 3 * GRANULE) == OK
    assert device.live["mappings"] == 1
    assert driver.mem_unmap(address, 3 * GRANULE) == INVALID_VALUE


def test_address_free_takes_exactly_one_unmapped_reservation(
    driver: _C.Driver, memory: Memory
) -> None:
    address = memory.reserve(2 * GRANULE)
    memory.map(address + GRANULE, memory.create())
    assert driver.address_free(address, 2 * GRANULE) == INVALID_VALUE, "still mapped"
    assert driver.mem_unmap(address + GRANULE, GRANULE) == OK
    assert driver.address_free(address, GRANULE) == INVALID_VALUE
    assert driver.address_free(address + GRANULE, GRANULE) == INVALID_VALUE
    assert driver.address_free(address, 2 * GRANULE) == OK
    assert driver.address_free(address, 2 * GRANULE) == INVALID_VALUE


def test_reservations_are_aligned_as_asked(driver: _C.Driver) -> None:
    for alignment in (0, GRANULE, 8 * GRANULE, 64 * GRANULE):
        code, address = driver.address_reserve(3 * GRANULE, alignment)
        assert code == OK
        assert address % max(alignment, GRANULE) == 0
        assert driver.address_free(address, 3 * GRANULE) == OK
    assert driver.address_reserve(GRANULE, 3 * GRANULE)[0] == INVALID_VALUE


def test_bytes_stay_with_the_handle_wherever_it_is_mapped(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    a, b = memory.reserve(4 * GRANULE), memory.reserve(4 * GRANULE)
    handles = [memory.create() for _ in range(4)]
    contents = pattern(4 * GRANULE, seed=1)
    for round_idx, address in enumerate([a, b, a, a, b]):
        for i, handle in enumerate(handles):
            memory.map(address + i * GRANULE, handle)
        assert driver.mem_set_access(address, 4 * GRANULE, READWRITE) == OK
        if round_idx == 0:
            device_bytes.write(address, contents)
        assert_bitwise_equal(device_bytes.read(address, 4 * GRANULE), contents)
        assert driver.mem_unmap(address, 4 * GRANULE) == OK


def test_handles_can_be_mapped_in_any_order(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    address = memory.reserve(3 * GRANULE)
    handles = [memory.create() for _ in range(3)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        for i, handle_idx in enumerate(order):
            memory.map(address + i * GRANULE, handles[handle_idx])
        assert driver.mem_set_access(address, 3 * GRANULE, READWRITE) == OK
        if order == [0, 1, 2]:
            for i in range(3):
                device_bytes.fill(address + i * GRANULE, i + 1, GRANULE)
        for i, handle_idx in enumerate(order):
            assert (device_bytes.read(address + i * GRANULE, GRANULE) == handle_idx + 1).all()
        assert driver.mem_unmap(address, 3 * GRANULE) == OK


@pytest.mark.parametrize("unmap_first", ["first", "second"])
def test_one_handle_at_two_addresses_is_the_same_memory(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes, unmap_first: str
) -> None:
    first, second, handle = memory.reserve(GRANULE), memory.reserve(GRANULE), memory.create()
    for address in (first, second):
        memory.map(address, handle)
        assert driver.mem_set_access(address, GRANULE, READWRITE) == OK
    device_bytes.fill(first, 5, GRANULE)
    assert (device_bytes.read(second, GRANULE) == 5).all()
    device_bytes.fill(second + 100, 6, 50)
    assert (device_bytes.read(first + 100, 50) == 6).all()
    gone, left = (first, second) if unmap_first == "first" else (second, first)
    assert driver.mem_unmap(gone, GRANULE) == OK
    assert (device_bytes.read(left + 100, 50) == 6).all()
    memory.map(gone, handle)
    assert driver.mem_set_access(gone, GRANULE, READWRITE) == OK
    device_bytes.fill(gone, 7, 10)
    assert (device_bytes.read(left, 10) == 7).all()


def test_copies_respect_access(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    if driver.memory_info()[1] > 4 << 30:
        pytest.skip("an illegal copy is a sticky error on a real GPU")
    address, handle = memory.reserve(2 * GRANULE), memory.create()
    host = np.zeros(GRANULE, np.uint8)
    _, stream = driver.stream_create()

    def copies() -> tuple[int, int, int, int]:
        codes = (
            driver.memcpy_h2d_async(address, host.ctypes.data, 100, stream),
            driver.memcpy_d2h_async(host.ctypes.data, address, 100, stream),
            driver.memcpy_d2d_async(address, address + 1000, 100, stream),
            driver.memset_async(address, 1, 100, stream),
        )
        driver.stream_synchronize(stream)
        return codes

    refused = (INVALID_VALUE,) * 4
    assert copies() == refused, "nothing is mapped"
    memory.map(address, handle)
    assert copies() == refused, "mapped without access"
    assert driver.mem_set_access(address, GRANULE, READ) == OK
    assert copies() == (INVALID_VALUE, OK, INVALID_VALUE, INVALID_VALUE)
    assert driver.mem_set_access(address, GRANULE, READWRITE) == OK
    assert copies() == (OK,) * 4
    assert driver.memset_async(address + GRANULE - 10, 1, 20, stream) == INVALID_VALUE
    assert driver.mem_set_access(address, GRANULE, NONE) == OK
    assert copies() == refused
    assert driver.mem_unmap(address, GRANULE) == OK
    assert copies() == refused
    driver.stream_destroy(stream)


def test_read_only_memory_is_writable_again_where_it_is_mapped_next(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    a, b, handle = memory.reserve(GRANULE), memory.reserve(GRANULE), memory.create()
    memory.map(a, handle)
    assert driver.mem_set_access(a, GRANULE, READWRITE) == OK
    device_bytes.fill(a, 3, GRANULE)
    assert driver.mem_set_access(a, GRANULE, READ) == OK
    assert driver.mem_unmap(a, GRANULE) == OK
    memory.map(b, handle)
    assert driver.mem_set_access(b, GRANULE, READWRITE) == OK
    device_bytes.fill(b, 4, 10)
    assert device_bytes.read(b, 20).tolist() == [4] * 10 + [3] * 10


def test_a_stream_runs_its_work_in_order(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    address = memory.reserve(8 * GRANULE)
    memory.map(address, memory.create(8 * GRANULE), 8 * GRANULE)
    assert driver.mem_set_access(address, 8 * GRANULE, READWRITE) == OK
    _, stream = driver.stream_create()
    for value in range(1, 20):
        assert driver.memset_async(address, value, 8 * GRANULE, stream) == OK
    half = 4 * GRANULE
    assert driver.memcpy_d2d_async(address + half, address, half, stream) == OK
    assert driver.memset_async(address, 99, 10, stream) == OK
    assert driver.stream_synchronize(stream) == OK
    assert (device_bytes.read(address, 10) == 99).all()
    assert (device_bytes.read(address + half, half) == 19).all()
    driver.stream_destroy(stream)


def test_an_event_is_reached_when_the_work_before_it_is_done(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    size = 32 * GRANULE
    address = memory.reserve(size)
    memory.map(address, memory.create(size), size)
    assert driver.mem_set_access(address, size, READWRITE) == OK
    _, first = driver.stream_create()
    _, second = driver.stream_create()
    _, event = driver.event_create()
    assert driver.event_query(event) == OK, "an event that was never recorded is complete"
    assert driver.event_synchronize(event) == OK
    for value in (1, 2, 3):
        driver.memset_async(address, value, size, first)
        driver.event_record(event, first)
        driver.stream_wait_event(second, event)
        driver.memset_async(address + size // 2, value + 100, size // 2, second)
        driver.stream_synchronize(second)
        tail = device_bytes.read(address + size - 10, 10)
        assert (tail == value + 100).all(), "the second stream did not wait"
    assert driver.event_synchronize(event) == OK
    assert driver.event_query(event) == OK
    for stream in (first, second):
        assert driver.stream_destroy(stream) == OK
    assert driver.event_destroy(event) == OK


def test_unknown_streams_and_events_are_refused(host: FaultyDevice) -> None:
    driver = host._driver
    assert driver.stream_synchronize(77) == INVALID_HANDLE
    assert driver.stream_destroy(77) == INVALID_HANDLE
    assert driver.event_query(77) == INVALID_HANDLE
    assert driver.event_destroy(77) == INVALID_HANDLE
    assert driver.stream_is_capturing(77)[0] == INVALID_HANDLE
    assert driver.host_free(77) == INVALID_VALUE
    assert host.live == {}


def test_destroying_a_stream_finishes_its_work(host: FaultyDevice) -> None:
    driver = host._driver
    _, memory = driver.host_alloc(64 * MIB)
    _, address = driver.address_reserve(64 * MIB, 0)
    _, handle = driver.mem_create(64 * MIB)
    driver.mem_map(address, 64 * MIB, 0, handle)
    driver.mem_set_access(address, 64 * MIB, READWRITE)
    _, stream = driver.stream_create()
    for _ in range(5):
        driver.memcpy_h2d_async(address, memory, 64 * MIB, stream)
    assert driver.stream_destroy(stream) == OK
    assert driver.mem_unmap(address, 64 * MIB) == OK, "a crash here: the copy was still running"
    assert driver.host_free(memory) == OK
    assert driver.mem_release(handle) == OK
    assert driver.address_free(address, 64 * MIB) == OK
    assert host.live == {}


def test_host_memory_is_zero_and_writable(driver: _C.Driver, device: FaultyDevice) -> None:
    code, memory = driver.host_alloc(3 * MIB + 5)
    assert code == OK
    data = np.ctypeslib.as_array((ctypes.c_uint8 * (3 * MIB + 5)).from_address(memory))
    assert not data.any()
    data[:] = 1
    assert driver.host_free(memory) == OK
    assert driver.host_alloc(0)[0] == INVALID_VALUE
    assert device.live == {}


def test_registered_memory_is_copied_like_any_other(
    driver: _C.Driver, memory: Memory, device_bytes: DeviceBytes
) -> None:
    address = memory.reserve(GRANULE)
    memory.map(address, memory.create())
    assert driver.mem_set_access(address, GRANULE, READWRITE) == OK
    buffer = mmap.mmap(-1, 3 * MIB)
    view = np.frombuffer(buffer, np.uint8)
    view[:] = contents = pattern(3 * MIB, seed=4)
    begin = view.ctypes.data
    assert driver.host_register(begin, 2 * MIB + 5) == OK
    for offset, size in [(0, 10), (MIB, MIB + 5), (3 * MIB - 10, 10)]:
        _, stream = driver.stream_create()
        assert driver.memcpy_h2d_async(address, begin + offset, size, stream) == OK
        assert driver.stream_destroy(stream) == OK
        assert_bitwise_equal(device_bytes.read(address, size), contents[offset : offset + size])
    assert driver.host_unregister(begin) == OK


def test_host_memory_is_registered_once_from_a_page_on(
    driver: _C.Driver, device: FaultyDevice
) -> None:
    buffer = mmap.mmap(-1, 8 * MIB)
    begin = np.frombuffer(buffer, np.uint8).ctypes.data
    assert driver.host_register(begin, 0) == INVALID_VALUE
    assert driver.host_register(0, MIB) == INVALID_VALUE
    assert driver.host_register(begin + 64, MIB) == INVALID_VALUE
    assert driver.host_unregister(begin) == NOT_REGISTERED
    assert driver.host_register(begin + 2 * MIB, 2 * MIB) == OK
    for offset, size in [(0, 8), (0, 3), (2, 1), (2, 2), (3, 1), (3, 4)]:
        code = driver.host_register(begin + offset * MIB, size * MIB)
        assert code == ALREADY_REGISTERED, (offset, size)
    assert driver.host_register(begin, 2 * MIB) == OK
    assert driver.host_register(begin + 4 * MIB, 4 * MIB) == OK
    assert device.live == {"registrations": 3}
    for offset in (2, 0, 4):
        assert driver.host_unregister(begin + offset * MIB) == OK
        assert driver.host_unregister(begin + offset * MIB) == NOT_REGISTERED
    assert device.live == {}


def test_a_stream_is_not_captured_by_itself(driver: _C.Driver, device: FaultyDevice) -> None:
    _, stream = driver.stream_create()
    assert driver.stream_is_capturing(stream) == (OK, False)
    with device.capturing():
        assert driver.stream_is_capturing(stream) == (OK, True)
    assert driver.stream_is_capturing(stream) == (OK, False)
    driver.stream_destroy(stream)


def test_memory_that_was_touched_once_is_mapped_again_without_page_faults(
    host: FaultyDevice,
) -> None:
    """What makes a switch on the host device cost microseconds. Linux 5.13 or later."""
    size = 32 * MIB
    driver = host._driver
    _, handle = driver.mem_create(size)
    ranges = [driver.address_reserve(size, 0)[1] for _ in range(2)]

    def faults_of_a_write(address: int) -> int:
        assert driver.mem_map(address, size, 0, handle) == OK
        assert driver.mem_set_access(address, size, READWRITE) == OK
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ctypes.memset(address, 1, size)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    first = faults_of_a_write(ranges[0])
    assert first >= size // (2 * MIB), "this test does not count what it should"
    for address in [ranges[1], ranges[0], ranges[1]]:
        driver.mem_unmap(ranges[0], size)
        driver.mem_unmap(ranges[1], size)
        assert faults_of_a_write(address) < 10


def test_neighbouring_handles_are_one_area_to_the_kernel(host: FaultyDevice) -> None:
    """They move in one call, and count once against vm.max_map_count. Linux 5.13 or later."""
    num_handles = 64
    size = num_handles * GRANULE
    driver = host._driver
    handles = [driver.mem_create(GRANULE)[1] for _ in range(num_handles)]
    address = driver.address_reserve(size, 0)[1]

    def num_areas() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = num_areas()
    for turn in range(3):
        for i, handle in enumerate(handles):
            assert driver.mem_map(address + i * GRANULE, GRANULE, 0, handle) == OK
        assert driver.mem_set_access(address, size, READWRITE) == OK
        assert num_areas() <= before + 4, "as many areas as handles"
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ctypes.memset(address, turn, size)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        assert turn == 0 or faults < 10
        # Parts that were touched alone are taken along.
        assert driver.mem_unmap(address + 5 * GRANULE, GRANULE) == OK
        assert driver.mem_map(address + 5 * GRANULE, GRANULE, 0, handles[5]) == OK
        assert driver.mem_set_access(address + 5 * GRANULE, GRANULE, READWRITE) == OK
        assert driver.mem_unmap(address, size) == OK
        assert num_areas() <= before + 4
    assert driver.address_free(address, size) == OK
    for handle in handles:
        assert driver.mem_release(handle) == OK
    assert host.live == {}
