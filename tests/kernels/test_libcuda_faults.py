"""The libcuda driver over the stub: every function of the library fails in every call of ours."""

from __future__ import annotations

import itertools
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_support import GRANULE, MIB, StubCuda

import aegaeon_kernels as ak
from aegaeon_kernels import _C

OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_REGISTERED, NOT_SUPPORTED = 0, 1, 2, 713, 801
GIB = 1 << 30
MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on
READWRITE = _C.Access.READWRITE


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
