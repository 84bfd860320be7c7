"""The libcuda driver over the stub: what it asks of the driver library, and what it does when the
library lacks something, says no, or is in the middle of somebody's graph capture."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
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


@pytest.fixture
def stub(stub_cuda: StubCuda) -> Iterator[StubCuda]:
    yield stub_cuda
    stub_cuda.fail("", n=0)
    assert stub_cuda.take_thread_state() == (0, 0), "the calling thread is not as it was"
    assert stub_cuda.live().keys() <= {"contexts"}, "something is left behind"


@pytest.fixture
def driver(stub: StubCuda) -> _C.Driver:
    return ak.Device("cuda:0", library=stub.path)._driver


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


# Faults: every function of the library, in every call of ours that uses it

FAULT = 719
# Putting the thread back as it was comes last: the call has succeeded, so this is reported only.
LAST_STEPS = {"cuCtxPopCurrent_v2", "cuThreadExchangeStreamCaptureMode"}


class World:
    """What the calls below work on."""

    def __init__(self, driver: _C.Driver) -> None:
        self.driver = driver
        self.handle = value(driver.mem_create(GRANULE, exportable=True))
        self.spare = value(driver.mem_create(GRANULE))
        self.fd = value(driver.mem_export(self.handle))
        self.stream = value(driver.stream_create())
        self.event = value(driver.event_create())
        self.memory = value(driver.host_alloc(4096))
        self.numa = value(driver.host_alloc_numa(4096))
        self.address = value(driver.address_reserve(2 * GRANULE, 0))
        self.empty = value(driver.address_reserve(GRANULE, 0))
        self._buffer = mmap.mmap(-1, 2 * MIB)
        self.existing = np.frombuffer(self._buffer, np.uint8).ctypes.data
        self.map()
        self.register()

    def map(self) -> None:
        assert self.driver.mem_map(self.address, GRANULE, 0, self.handle) == OK
        assert self.driver.mem_set_access(self.address, GRANULE, READWRITE) == OK

    def register(self) -> None:
        assert self.driver.host_register(self.existing, MIB) == OK

    def close(self) -> None:
        os.close(self.fd)
        codes = [
            self.driver.mem_unmap(self.address, GRANULE),
            self.driver.address_free(self.address, 2 * GRANULE),
            self.driver.address_free(self.empty, GRANULE),
            self.driver.mem_release(self.handle),
            self.driver.mem_release(self.spare),
            self.driver.stream_destroy(self.stream),
            self.driver.event_destroy(self.event),
            self.driver.host_free(self.memory),
            self.driver.host_free(self.numa),
            self.driver.host_unregister(self.existing),
        ]
        assert codes == [OK] * len(codes)


def value(result: tuple[int, int]) -> int:
    code, made = result
    assert code == OK
    return made


def memory_info(world: World) -> int:
    try:
        world.driver.memory_info()
    except ak.DriverError as error:
        return error.code
    return OK


Call = Callable[[World], int | tuple[int, int]]
Undo = Callable[[World, int], object]
# What is called, and what takes its effect back; that is given what the call has made, if anything.
CALLS: dict[str, tuple[Call, Undo]] = {
    "memory_info": (memory_info, lambda w, _: None),
    "mem_create": (lambda w: w.driver.mem_create(GRANULE), lambda w, it: w.driver.mem_release(it)),
    "mem_release": (
        lambda w: w.driver.mem_release(w.spare),
        lambda w, _: setattr(w, "spare", value(w.driver.mem_create(GRANULE))),
    ),
    "mem_export": (lambda w: w.driver.mem_export(w.handle), lambda w, it: os.close(it)),
    "mem_import": (
        lambda w: w.driver.mem_import(w.fd, GRANULE),
        lambda w, it: w.driver.mem_release(it),
    ),
    "address_reserve": (
        lambda w: w.driver.address_reserve(GRANULE, 0),
        lambda w, it: w.driver.address_free(it, GRANULE),
    ),
    "address_free": (
        lambda w: w.driver.address_free(w.empty, GRANULE),
        lambda w, _: setattr(w, "empty", value(w.driver.address_reserve(GRANULE, 0))),
    ),
    "mem_map": (
        lambda w: w.driver.mem_map(w.address + GRANULE, GRANULE, 0, w.spare),
        lambda w, _: w.driver.mem_unmap(w.address + GRANULE, GRANULE),
    ),
    "mem_set_access": (
        lambda w: w.driver.mem_set_access(w.address, GRANULE, _C.Access.READ),
        lambda w, _: w.driver.mem_set_access(w.address, GRANULE, READWRITE),
    ),
    "mem_unmap": (lambda w: w.driver.mem_unmap(w.address, GRANULE), lambda w, _: w.map()),
    "host_alloc": (lambda w: w.driver.host_alloc(4096), lambda w, it: w.driver.host_free(it)),
    "host_free": (
        lambda w: w.driver.host_free(w.memory),
        lambda w, _: setattr(w, "memory", value(w.driver.host_alloc(4096))),
    ),
    "host_alloc_numa": (
        lambda w: w.driver.host_alloc_numa(4096),
        lambda w, it: w.driver.host_free(it),
    ),
    "host_register": (
        lambda w: w.driver.host_register(w.existing + MIB, MIB),
        lambda w, _: w.driver.host_unregister(w.existing + MIB),
    ),
    "host_unregister": (
        lambda w: w.driver.host_unregister(w.existing),
        lambda w, _: w.register(),
    ),
    "stream_create": (
        lambda w: w.driver.stream_create(),
        lambda w, it: w.driver.stream_destroy(it),
    ),
    "stream_destroy": (
        lambda w: w.driver.stream_destroy(w.stream),
        lambda w, _: setattr(w, "stream", value(w.driver.stream_create())),
    ),
    "stream_synchronize": (lambda w: w.driver.stream_synchronize(w.stream), lambda w, _: None),
    "stream_wait_event": (
        lambda w: w.driver.stream_wait_event(w.stream, w.event),
        lambda w, _: None,
    ),
    "stream_is_capturing": (lambda w: w.driver.stream_is_capturing(w.stream), lambda w, _: None),
    "memcpy_h2d_async": (
        lambda w: w.driver.memcpy_h2d_async(w.address, w.memory, 9, w.stream),
        lambda w, _: None,
    ),
    "memcpy_d2h_async": (
        lambda w: w.driver.memcpy_d2h_async(w.memory, w.address, 9, w.stream),
        lambda w, _: None,
    ),
    "memcpy_d2d_async": (
        lambda w: w.driver.memcpy_d2d_async(w.address, w.address + 9, 9, w.stream),
        lambda w, _: None,
    ),
    "memset_async": (
        lambda w: w.driver.memset_async(w.address, 9, 9, w.stream),
        lambda w, _: None,
    ),
    "event_create": (lambda w: w.driver.event_create(), lambda w, it: w.driver.event_destroy(it)),
    "event_destroy": (
        lambda w: w.driver.event_destroy(w.event),
        lambda w, _: setattr(w, "event", value(w.driver.event_create())),
    ),
    "event_record": (lambda w: w.driver.event_record(w.event, w.stream), lambda w, _: None),
    "event_query": (lambda w: w.driver.event_query(w.event), lambda w, _: None),
    "event_synchronize": (lambda w: w.driver.event_synchronize(w.event), lambda w, _: None),
}

FUNCTIONS = re.findall(
    r"^(?:API|VMM|V2|OPTIONAL) int (cu\w+)\(",
    Path(__file__).with_name("stub_libcuda.c").read_text(),
    re.MULTILINE,
)
OPENING = {
    "cuInit": "does not start",
    "cuDeviceGetCount": "cannot count",
    "cuDeviceGet": "cuda:0",
    "cuMemGetAllocationGranularity": "cuda:0",
    "cuDevicePrimaryCtxRetain": "no context on cuda:0",
}


def code_of(result: int | tuple[int, int]) -> int:
    return result[0] if isinstance(result, tuple) else result


def test_every_function_fails_once_in_every_call(
    stub: StubCuda, driver: _C.Driver, capfd: pytest.CaptureFixture[str]
) -> None:
    """The call returns the code and has done nothing, and it works when it is tried again."""
    world = World(driver)
    live = stub.live()
    fired = set()
    for name, (call, undo) in CALLS.items():
        for function in FUNCTIONS:
            for n in itertools.count(1):
                where = f"{name}, call {n} of {function}"
                stub.fail(function, n, FAULT)
                result = call(world)
                if stub.fault_is_pending():  # it does not make so many calls of it
                    stub.fail("", 0)
                    assert code_of(result) == OK, where
                    undo(world, result[1] if isinstance(result, tuple) else 0)
                    break
                fired.add(function)
                complaint = capfd.readouterr().err
                if code_of(result) == OK:
                    assert function in LAST_STEPS, where
                    assert f"{function.removesuffix('_v2')} failed with code 719" in complaint
                    assert stub.take_thread_state() != (0, 0), where
                else:
                    assert code_of(result) == FAULT, where
                    assert complaint == "", where
                    assert stub.take_thread_state() == (0, 0), where
                    assert stub.live() == live, where
                    result = call(world)
                    assert code_of(result) == OK, f"{where}: and again"
                undo(world, result[1] if isinstance(result, tuple) else 0)
                assert stub.live() == live, where
    assert set(FUNCTIONS) - fired == {
        *OPENING.keys() - {"cuMemGetAllocationGranularity"},  # host_alloc_numa asks as well
        "cuDeviceGetAttribute",  # no answer is "no"
        "cuDevicePrimaryCtxRelease_v2",
        "cuGetErrorString",
    }
    world.close()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_freeing_numa_memory_may_be_tried_again(stub: StubCuda, driver: _C.Driver, n: int) -> None:
    function = ["cuMemUnmap", "cuMemAddressFree", "cuMemRelease"][n - 1]
    memory = value(driver.host_alloc_numa(4096))
    stub.fail(function, code=FAULT)
    assert driver.host_free(memory) == FAULT
    assert len(stub.live()) == 5 - n  # of context, handle, reservation, mapping
    assert driver.host_free(memory) == OK


@pytest.mark.parametrize("function", OPENING)
def test_a_device_that_does_not_open_leaves_nothing(stub: StubCuda, function: str) -> None:
    stub.fail(function, code=FAULT)
    with pytest.raises(ak.DriverError, match=OPENING[function]) as caught:
        ak.Device("cuda:0", library=stub.path)
    assert (caught.value.call, caught.value.code) == (function, FAULT)
    assert "some error (code 719); install the NVIDIA driver" in str(caught.value)
    assert stub.live() == {}
    ak.Device("cuda:0", library=stub.path)


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGetCount"])
def test_a_driver_that_does_not_start_has_no_devices(stub: StubCuda, function: str) -> None:
    stub.fail(function)
    assert ak.Device.available(library=stub.path) == ["host"]


def test_a_context_that_cannot_be_released_is_reported(
    stub: StubCuda, capfd: pytest.CaptureFixture[str]
) -> None:
    device = ak.Device("cuda:0", library=stub.path)
    stub.fail("cuDevicePrimaryCtxRelease")
    del device
    assert "cuDevicePrimaryCtxRelease failed with code 1" in capfd.readouterr().err


def test_a_code_without_a_text_is_still_shown(stub: StubCuda, driver: _C.Driver) -> None:
    assert driver.describe(2) == "out of memory"
    stub.fail("cuGetErrorString")
    assert driver.describe(2) == "unknown driver error"
