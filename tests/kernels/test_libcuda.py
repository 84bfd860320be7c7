"""The libcuda driver over the stub: what it asks of the driver library, and what it does when the
library lacks something, says no, or is in the middle of somebody's graph capture."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kernel_support import GRANULE, MIB, DeviceBytes, StubCuda, build_stub, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import assert_bitwise_equal

OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_REGISTERED, NOT_SUPPORTED = 0, 1, 2, 713, 801
GIB = 1 << 30
MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on
READWRITE = _C.Access.READWRITE


# Symbols


@pytest.mark.parametrize(
    ("flag", "symbol"), [("VMM", r"cuMem\w+"), ("V2", "cuDevicePrimaryCtxRelease_v2")]
)
def test_a_library_without_a_needed_symbol_is_named_with_the_symbol(
    tmp_path: Path, flag: str, symbol: str
) -> None:
    library = build_stub(tmp_path, f"-DSTUB_WITHOUT_{flag}")
    message = rf"the CUDA driver {re.escape(str(library))} has no {symbol}: it is too old.*update"
    with pytest.raises(ak.DriverError, match=message) as caught:
        ak.Device("cuda:0", library=str(library))
    assert (caught.value.call, caught.value.code) == ("dlsym", NOT_SUPPORTED)
    assert ak.Device.available(library=str(library)) == ["host"]


def test_a_library_without_the_optional_symbols_does_all_the_rest(tmp_path: Path) -> None:
    library = build_stub(tmp_path, "-DSTUB_WITHOUT_OPTIONAL")
    device = ak.Device("cuda:0", library=str(library))
    driver = device._driver
    arena = ak.Arena(device, capacity_bytes=2 * GRANULE)
    region = arena.reserve(2 * GRANULE, owner="a")
    region.map()
    data = DeviceBytes(device)
    data.fill(region.address, 3, 2 * GRANULE)
    data.close()
    _, stream = driver.stream_create()
    assert driver.mem_create(GRANULE, exportable=True)[0] == NOT_SUPPORTED
    assert driver.mem_export(0)[0] == NOT_SUPPORTED
    assert driver.mem_import(0, GRANULE)[0] == NOT_SUPPORTED
    assert driver.host_register(mmap.PAGESIZE, mmap.PAGESIZE) == NOT_SUPPORTED
    assert driver.host_unregister(mmap.PAGESIZE) == NOT_SUPPORTED
    assert driver.stream_is_capturing(stream)[0] == NOT_SUPPORTED
    driver.stream_destroy(stream)


# Properties of what is created


@pytest.mark.parametrize(
    ("attribute", "exportable", "num_rdma"), [("1", True, 1), ("1", False, 0), ("0", True, 0)]
)
def test_shared_memory_is_made_for_rdma_where_the_device_can(
    stub: StubCuda,
    monkeypatch: pytest.MonkeyPatch,
    attribute: str,
    exportable: bool,
    num_rdma: int,
) -> None:
    monkeypatch.setenv("STUB_CUDA_RDMA", attribute)
    driver = ak.Device("cuda:0", library=stub.path)._driver
    code, handle = driver.mem_create(GRANULE, exportable=exportable)
    assert code == OK
    assert stub.num_rdma_handles() == num_rdma
    assert driver.mem_release(handle) == OK


def test_a_device_that_cannot_export_says_so(
    stub: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_CUDA_EXPORT", "0")
    driver = ak.Device("cuda:0", library=stub.path)._driver
    assert driver.mem_create(GRANULE, exportable=True)[0] == NOT_SUPPORTED
    assert driver.mem_export(5)[0] == NOT_SUPPORTED
    code, handle = driver.mem_create(GRANULE)
    assert code == OK
    assert driver.mem_release(handle) == OK


# Host memory


@pytest.mark.parametrize("node", ["-1", "0", "3"])
def test_numa_memory_is_usable_by_host_and_device(
    stub: StubCuda, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    monkeypatch.setenv("STUB_CUDA_NUMA_NODE", node)
    device = ak.Device("cuda:0", library=stub.path)
    driver = device._driver
    free = driver.memory_info()
    size = GRANULE + 5
    code, memory = driver.host_alloc_numa(size)
    assert code == OK
    assert driver.memory_info() == free, "it is no device memory"
    assert stub.live() == {"contexts": 1, "handles": 1, "reservations": 1, "mappings": 1}
    view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(memory))
    view[:] = pattern(size, seed=3)
    arena = ak.Arena(device, capacity_bytes=2 * GRANULE)
    region = arena.reserve(2 * GRANULE, owner="a")
    region.map()
    _, stream = driver.stream_create()
    assert driver.memcpy_h2d_async(region.address, memory, size, stream) == OK
    view[:] = 0
    assert driver.memcpy_d2h_async(memory, region.address, size, stream) == OK
    assert driver.stream_destroy(stream) == OK
    assert_bitwise_equal(view, pattern(size, seed=3))
    region.close()
    arena.close()
    assert driver.host_free(memory) == OK
    assert driver.host_free(memory) != OK
    assert driver.host_alloc_numa(0)[0] == INVALID_VALUE
    assert stub.live() == {"contexts": 1}


def test_without_numa_support_there_is_none(
    stub: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_CUDA_NUMA", "0")
    driver = ak.Device("cuda:0", library=stub.path)._driver
    assert driver.host_alloc_numa(GRANULE) == (NOT_SUPPORTED, 0)


@pytest.fixture
def untouched() -> Iterator[int]:
    """The address of 2.5 GiB that cost nothing until they are touched."""
    buffer = mmap.mmap(-1, 5 * GIB // 2, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
    view = np.frombuffer(buffer, np.uint8)
    yield view.ctypes.data
    del view


def test_large_memory_is_registered_in_pieces_and_copied_across_them(
    stub: StubCuda, driver: _C.Driver, untouched: int
) -> None:
    assert driver.host_register(untouched, 5 * GIB // 2) == OK
    assert stub.live()["registrations"] == 3
    _, address = driver.address_reserve(GRANULE, 0)
    _, handle = driver.mem_create(GRANULE)
    assert driver.mem_map(address, GRANULE, 0, handle) == OK
    assert driver.mem_set_access(address, GRANULE, READWRITE) == OK
    _, stream = driver.stream_create()
    size = 8191
    contents = pattern(size, seed=9)
    for boundary in (GIB, 2 * GIB):
        host = untouched + boundary - 4000
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host))
        view[:] = contents
        assert driver.memcpy_h2d_async(address, host, size, stream) == OK
        view[:] = 0
        assert driver.memcpy_d2h_async(host, address, size, stream) == OK
        assert driver.stream_synchronize(stream) == OK
        assert_bitwise_equal(view, contents)
    end = untouched + 5 * GIB // 2
    code = driver.memcpy_h2d_async(address, end - 100, 200, stream)
    assert code == INVALID_VALUE, "half of it is not registered"
    assert driver.host_unregister(untouched) == OK
    assert "registrations" not in stub.live()
    driver.stream_destroy(stream)
    driver.mem_unmap(address, GRANULE)
    driver.mem_release(handle)
    driver.address_free(address, GRANULE)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_registration_is_all_or_nothing(
    stub: StubCuda, driver: _C.Driver, untouched: int, n: int
) -> None:
    stub.fail("cuMemHostRegister", n, code=OUT_OF_MEMORY)
    assert driver.host_register(untouched, 5 * GIB // 2) == OUT_OF_MEMORY
    assert "registrations" not in stub.live()
    assert driver.host_unregister(untouched) == NOT_REGISTERED
    assert driver.host_register(untouched, 5 * GIB // 2) == OK
    assert driver.host_unregister(untouched) == OK


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unregistering_may_be_tried_again(
    stub: StubCuda, driver: _C.Driver, untouched: int, n: int
) -> None:
    assert driver.host_register(untouched, 5 * GIB // 2) == OK
    stub.fail("cuMemHostUnregister", n, code=719)
    assert driver.host_unregister(untouched) == 719
    assert stub.live()["registrations"] == 4 - n
    assert driver.host_unregister(untouched) == OK
    assert "registrations" not in stub.live()


# Captures into graphs


def test_nothing_breaks_a_capture_by_another_thread(stub: StubCuda, driver: _C.Driver) -> None:
    """torch captures in the mode that forbids waiting, queries and allocation to every thread."""
    _, theirs = driver.stream_create()
    buffer = mmap.mmap(-1, MIB)
    host = np.frombuffer(buffer, np.uint8).ctypes.data
    with stub.capturing(theirs):
        codes = {"memory_info": OK}
        driver.memory_info()
        codes["mem_create"], handle = driver.mem_create(GRANULE, exportable=True)
        codes["mem_export"], fd = driver.mem_export(handle)
        codes["mem_import"], imported = driver.mem_import(fd, GRANULE)
        codes["address_reserve"], address = driver.address_reserve(GRANULE, 0)
        codes["mem_map"] = driver.mem_map(address, GRANULE, 0, handle)
        codes["mem_set_access"] = driver.mem_set_access(address, GRANULE, READWRITE)
        codes["stream_create"], stream = driver.stream_create()
        codes["event_create"], event = driver.event_create()
        codes["memset"] = driver.memset_async(address, 1, GRANULE, stream)
        codes["event_record"] = driver.event_record(event, stream)
        codes["event_query"] = driver.event_query(event)
        codes["event_synchronize"] = driver.event_synchronize(event)
        codes["stream_synchronize"] = driver.stream_synchronize(stream)
        codes["host_alloc"], memory = driver.host_alloc(100)
        codes["host_free"] = driver.host_free(memory)
        codes["host_alloc_numa"], memory = driver.host_alloc_numa(100)
        codes["host_free numa"] = driver.host_free(memory)
        codes["host_register"] = driver.host_register(host, MIB)
        codes["host_unregister"] = driver.host_unregister(host)
        codes["mem_unmap"] = driver.mem_unmap(address, GRANULE)
        codes["mem_release"] = driver.mem_release(handle)
        codes["mem_release imported"] = driver.mem_release(imported)
        codes["address_free"] = driver.address_free(address, GRANULE)
        codes["event_destroy"] = driver.event_destroy(event)
        codes["stream_destroy"] = driver.stream_destroy(stream)
        assert codes == dict.fromkeys(codes, OK)
        assert driver.stream_is_capturing(theirs) == (OK, True)
    os.close(fd)
    assert driver.stream_is_capturing(theirs) == (OK, False)
    driver.stream_destroy(theirs)


def test_the_stub_notices_a_broken_capture(stub: StubCuda, driver: _C.Driver) -> None:
    _, theirs = driver.stream_create()

    def wait_for_the_captured() -> None:
        with stub.capturing(theirs):
            assert driver.stream_synchronize(theirs) == 900
            assert driver.stream_is_capturing(theirs) == (OK, True), "broken, and still captured"

    with pytest.raises(AssertionError, match="has broken it"):
        wait_for_the_captured()
    driver.stream_destroy(theirs)


def test_the_default_stream_counts_as_captured_while_another_is(
    stub: StubCuda, driver: _C.Driver
) -> None:
    """Waiting for it would wait for all streams, so asking is an error of its own (906)."""
    _, theirs = driver.stream_create()
    assert driver.stream_is_capturing(0) == (OK, False)
    with stub.capturing(theirs):
        assert driver.stream_is_capturing(0) == (OK, True)
    driver.stream_destroy(theirs)


def test_waiting_threads_keep_their_mode(stub: StubCuda, driver: _C.Driver) -> None:
    states = []

    def work() -> None:
        _, stream = driver.stream_create()
        driver.stream_synchronize(stream)
        driver.stream_destroy(stream)
        states.append(stub.take_thread_state())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert states == [(0, 0)]
