"""Memory that one process exports and another imports, on every driver: real second processes."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kernel_support import GRANULE, MIB, DeviceBytes, StubCuda, num_descriptors, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

OK, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 801
READWRITE = _C.Access.READWRITE
SIZE = 4 * GRANULE

# Maps what it is sent and adds 1 to every byte each time it is told to.
IMPORTER = """
import os, socket, sys
import numpy as np
import aegaeon_kernels as ak
from kernel_support import DeviceBytes

READWRITE = ak._C.Access.READWRITE
_, name, library, size = sys.argv
size = int(size)
device = ak.Device(name, library=library) if library else ak.Device(name, memory_bytes=2 << 20)
driver = device._driver
channel = socket.socket(fileno=0)
_, fds, _, _ = socket.recv_fds(channel, 1, 1)
free = driver.memory_info()
code, handle = driver.mem_import(fds[0], size)
assert code == 0, code
os.close(fds[0])
if device.kind == "host":
    assert driver.memory_info() == free, "it is the other process's memory"
_, address = driver.address_reserve(size, 0)
assert driver.mem_map(address, size, 0, handle) == 0
assert driver.mem_set_access(address, size, READWRITE) == 0
assert driver.mem_release(handle) == 0, "it is mapped, and so it stays"
access = DeviceBytes(device)
channel.send(b"ready")
while channel.recv(1):
    access.write(address, access.read(address, size) + np.uint8(1))
    channel.send(b"done!")
assert driver.mem_unmap(address, size) == 0
assert driver.address_free(address, size) == 0
if device.kind == "host":
    assert driver.memory_info() == free
"""


class Importer:
    def __init__(self, device: ak.Device, library: str, fd: int, size: int) -> None:
        self._channel, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", IMPORTER, device.name, library, str(size)],
            stdin=theirs,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        theirs.close()
        self._channel.settimeout(60)
        socket.send_fds(self._channel, [b"0"], [fd])
        assert self._channel.recv(5) == b"ready"

    def add_one(self) -> None:
        self._channel.send(b"1")
        assert self._channel.recv(5) == b"done!"

    def close(self) -> int:
        self._channel.close()
        return self._process.wait(60)


@pytest.fixture
def library(device: FaultyDevice, stub_cuda: StubCuda) -> str:
    """For the second process: how to open the same kind of device."""
    path = stub_cuda.path if device.memory_info()[1] <= 4 << 30 else "libcuda.so.1"
    return path if device.kind == "cuda" else ""


@contextmanager
def mapped(driver: _C.Driver, handle: int, size: int = SIZE) -> Iterator[int]:
    code, address = driver.address_reserve(size, 0)
    assert code == OK
    assert driver.mem_map(address, size, 0, handle) == OK
    assert driver.mem_set_access(address, size, READWRITE) == OK
    yield address
    assert driver.mem_unmap(address, size) == OK
    assert driver.address_free(address, size) == OK


def export(driver: _C.Driver, handle: int) -> int:
    code, fd = driver.mem_export(handle)
    assert code == OK
    return fd


def test_a_second_process_shares_the_bytes(
    device: FaultyDevice, device_bytes: DeviceBytes, library: str
) -> None:
    driver = device._driver
    code, handle = driver.mem_create(SIZE, exportable=True)
    assert code == OK
    fd = export(driver, handle)
    contents = pattern(SIZE, seed=7)
    with mapped(driver, handle) as address:
        device_bytes.write(address, contents)
        importer = Importer(device, library, fd, SIZE)
        os.close(fd)
        for turn in (1, 2):
            importer.add_one()
            assert_bitwise_equal(device_bytes.read(address, SIZE), contents + turn)
            device_bytes.write(address + GRANULE, contents[:GRANULE])
            contents[GRANULE : 2 * GRANULE] = contents[:GRANULE] - turn
        assert importer.close() == 0
        assert_bitwise_equal(device_bytes.read(address, SIZE), contents + 2)
    # Moved elsewhere, it is still the same memory.
    with mapped(driver, handle) as address:
        assert_bitwise_equal(device_bytes.read(address, SIZE), contents + 2)
    assert driver.mem_release(handle) == OK
    assert device.live == {"streams": 1}


def test_the_memory_outlives_its_exporter(
    device: FaultyDevice, device_bytes: DeviceBytes, library: str
) -> None:
    driver = device._driver
    _, handle = driver.mem_create(SIZE, exportable=True)
    fd = export(driver, handle)
    with mapped(driver, handle) as address:
        device_bytes.fill(address, 41, SIZE)
    importer = Importer(device, library, fd, SIZE)
    assert driver.mem_release(handle) == OK
    importer.add_one()
    assert importer.close() == 0
    code, again = driver.mem_import(fd, SIZE)
    assert code == OK
    os.close(fd)
    with mapped(driver, again) as address:
        assert (device_bytes.read(address, SIZE) == 42).all()
    assert driver.mem_release(again) == OK
    assert device.live == {"streams": 1}


def test_importing_ones_own_memory_is_not_paid_for_twice(
    device: FaultyDevice, device_bytes: DeviceBytes
) -> None:
    driver = device._driver
    free, total = driver.memory_info()
    _, handle = driver.mem_create(SIZE, exportable=True)
    fd = export(driver, handle)
    code, imported = driver.mem_import(fd, SIZE)
    assert code == OK
    if total <= 4 << 30:  # nobody else uses this device
        assert driver.memory_info()[0] == free - SIZE
    with mapped(driver, handle) as first, mapped(driver, imported) as second:
        device_bytes.fill(first, 3, SIZE)
        assert (device_bytes.read(second, SIZE) == 3).all()
        assert driver.mem_release(handle) == OK
    with mapped(driver, imported) as address:
        assert (device_bytes.read(address, SIZE) == 3).all()
    if total <= 4 << 30:
        assert driver.memory_info()[0] == free - SIZE, "an importer still holds it"
    assert driver.mem_release(imported) == OK
    if total <= 4 << 30:
        assert driver.memory_info()[0] == free
    os.close(fd)


def test_descriptors_are_the_callers_and_close_on_exec(device: FaultyDevice) -> None:
    driver = device._driver
    _, handle = driver.mem_create(GRANULE, exportable=True)
    first, second = export(driver, handle), export(driver, handle)
    assert first != second
    for fd in (first, second):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(first)
    code, imported = driver.mem_import(second, GRANULE)
    assert code == OK
    os.fstat(second)  # still open: the import left it alone
    os.close(second)
    assert driver.mem_release(imported) == OK
    assert driver.mem_release(handle) == OK


def test_only_what_was_made_for_it_is_exported(device: FaultyDevice) -> None:
    driver = device._driver
    _, handle = driver.mem_create(GRANULE)
    assert driver.mem_export(handle)[0] == INVALID_VALUE
    assert driver.mem_release(handle) == OK
    assert driver.mem_create(GRANULE + 1, exportable=True)[0] == INVALID_VALUE


def test_what_is_no_exported_memory_is_not_imported(host: FaultyDevice) -> None:
    """A CUDA driver checks its descriptors itself, and the size only when it is mapped."""
    driver = host._driver
    _, handle = driver.mem_create(2 * GRANULE, exportable=True)
    fd = export(driver, handle)
    for size in (0, GRANULE, 4 * GRANULE, GRANULE + 1):
        assert driver.mem_import(fd, size)[0] == INVALID_VALUE
    os.close(fd)
    assert driver.mem_import(fd, 2 * GRANULE)[0] == INVALID_VALUE, "closed"
    other = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(other, 2 * GRANULE)
    # Its owner could shrink it, and the next touch here would end the process.
    assert driver.mem_import(other, 2 * GRANULE)[0] == INVALID_VALUE
    os.close(other)
    assert driver.mem_release(handle) == OK
    assert driver.mem_export(handle)[0] == INVALID_VALUE
    assert host.live == {}


def test_exported_memory_cannot_be_resized_by_an_importer(host: FaultyDevice) -> None:
    _, handle = host._driver.mem_create(GRANULE, exportable=True)
    fd = export(host._driver, handle)
    for size in (0, 2 * GRANULE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_only_exportable_handles_cost_a_descriptor_each() -> None:
    device = ak.Device("host", memory_bytes=512 * MIB)
    driver = device._driver
    before = num_descriptors()
    handles = [driver.mem_create(GRANULE)[1] for _ in range(100)]
    assert num_descriptors() == before + 1, "of the file that they share"
    shared = [driver.mem_create(GRANULE, exportable=True)[1] for _ in range(10)]
    assert num_descriptors() == before + 11
    assert all(driver.mem_release(handle) == OK for handle in shared[:5])
    assert num_descriptors() == before + 6
    assert all(driver.mem_release(handle) == OK for handle in handles)
    assert num_descriptors() == before + 5
    del device, driver
    assert num_descriptors() == before


def test_running_out_of_descriptors_is_out_of_memory(host: FaultyDevice) -> None:
    driver = host._driver
    _, handle = driver.mem_create(GRANULE, exportable=True)
    free = driver.memory_info()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        codes = driver.mem_create(GRANULE)[0], driver.mem_export(handle)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert codes == (2, 2)
    assert driver.memory_info() == free
    assert driver.mem_release(handle) == OK
