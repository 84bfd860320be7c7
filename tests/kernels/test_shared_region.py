"""A region's memory in another process: real second processes over a unix socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from kernel_support import GRANULE, DeviceBytes, StubCuda, num_descriptors, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice

SIZE = 8 * GRANULE


# Maps what it is sent; then runs each line of code that it is sent, and answers with a byte.
PEER = """
import socket, sys

import numpy as np
import aegaeon_kernels as ak
from kernel_support import DeviceBytes

_, name, library, read_only = sys.argv
device = ak.Device(name, library=library) if library else ak.Device(name, memory_bytes=2 << 20)
channel = socket.socket(fileno=0)
with ak.SharedHandles.receive(channel) as handles:
    shared = ak.SharedRegion.open(device, handles, read_only=bool(read_only))
bytes_ = DeviceBytes(device)
channel.send(b"!")
while code := channel.recv(4096):
    exec(code)
    channel.send(b"!")
channel.close()
"""


class Peer:
    def __init__(self, device: ak.Device, library: str, *, read_only: bool = False) -> None:
        self.channel, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PEER, device.name, library, "1" * read_only],
            stdin=theirs,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        theirs.close()
        self.channel.settimeout(120)

    def wait(self) -> None:
        if self.channel.recv(1) != b"!":
            self.channel.close()
            pytest.fail(self._process.communicate(timeout=120)[1].decode())

    def run(self, code: str) -> None:
        self.channel.send(code.encode())
        self.wait()

    def end(self) -> int:
        self.channel.close()
        _, errors = self._process.communicate(timeout=120)
        assert not errors, errors.decode()
        return self._process.returncode


@pytest.fixture
def library(device: FaultyDevice, stub_cuda: StubCuda) -> str:
    path = stub_cuda.path if device.memory_info()[1] <= 4 << 30 else "libcuda.so.1"
    return path if device.kind == "cuda" else ""


@pytest.fixture
def arena(device: FaultyDevice) -> Iterator[ak.Arena]:
    arena = ak.Arena(device, capacity_bytes=2 * SIZE, handle_bytes=2 * GRANULE, exportable=True)
    yield arena
    arena.close()


@pytest.fixture
def region(arena: ak.Arena) -> ak.Region:
    """With a hole, and handles of two sizes."""
    region = arena.reserve(SIZE, owner="a", tag="weights")
    region.map(0, 3 * GRANULE)
    region.map(5 * GRANULE, 3 * GRANULE)
    return region


def test_both_processes_see_the_same_bytes(
    device: FaultyDevice, device_bytes: DeviceBytes, region: ak.Region, library: str
) -> None:
    data = pattern(3 * GRANULE, seed=5)
    device_bytes.write(region.address, data)
    peer = Peer(device, library)
    with region.export_handles() as handles:
        assert len(handles.fds) == len(handles.ranges) == 4
        handles.send(peer.channel)
        peer.wait()
        peer.run(
            f"assert shared.mapped_ranges() == {region.mapped_ranges()}, shared.mapped_ranges()\n"
            f"assert shared.size_bytes == {SIZE}\n"
            f"data = np.empty({data.nbytes}, np.uint8)\n"
            "shared.copy_to(data)\n"
            f"shared.copy_from(data + np.uint8(1), {5 * GRANULE})"
        )
        there = device_bytes.read(region.address + 5 * GRANULE, data.nbytes)
        assert (there == data + np.uint8(1)).all()
        device_bytes.fill(region.address, 77, GRANULE)
        peer.run(f"assert (bytes_.read(shared.address, {GRANULE}) == 77).all()")
    peer.run("shared.close(); assert shared.closed")
    assert peer.end() == 0


def test_the_region_stays_until_the_handles_are_closed(
    region: ak.Region, device: FaultyDevice
) -> None:
    fds_before = num_descriptors()
    handles = region.export_handles()
    for refused in (region.unmap, region.close, region.arena.close):
        with pytest.raises(ak.LifecycleError, match="exported"):
            refused()
    handles.close()
    handles.close()
    assert num_descriptors() == fds_before
    handles = region.export_handles()
    del handles
    region.unmap()


def test_the_memory_outlives_the_process_that_made_it(
    device: FaultyDevice, region: ak.Region, library: str
) -> None:
    region.copy_from(b"still here")
    peer = Peer(device, library)
    handles = region.export_handles()
    handles.send(peer.channel)
    peer.wait()
    handles.close()
    region.close()  # its own risk: the handles were closed before the peer was done
    region.arena.close()
    assert device.live == {}
    peer.run("data = bytearray(10); shared.copy_to(data); assert data == b'still here'")
    peer.run("shared.close()")
    assert peer.end() == 0


def test_views_of_a_shared_region_keep_it(device: FaultyDevice, region: ak.Region) -> None:
    region.map(3 * GRANULE, 2 * GRANULE)
    with region.export_handles() as handles:
        shared = ak.SharedRegion.open(device, handles, read_only=False)
    view = _C.DLPackImport(shared.__dlpack__())
    with pytest.raises(ak.LifecycleError, match=r"1 view\(s\)"):
        shared.close()
    shared.close(abandon_views=True)
    shared.close()
    with pytest.raises(ak.LifecycleError, match="closed"):
        shared.copy_from(b"x")
    before = device.live["reservations"]
    del view, shared
    assert device.live["reservations"] == before - 1


def test_read_only_is_read_only(host: FaultyDevice) -> None:
    arena = ak.Arena(host, capacity_bytes=SIZE, exportable=True)
    region = arena.reserve(SIZE, owner="a")
    region.map()
    with region.export_handles() as handles:
        peer = Peer(host, "", read_only=True)
        handles.send(peer.channel)
        peer.wait()
        region.copy_from(b"abc")
        peer.run("view = shared.numpy((3,), 'u1'); assert view.tobytes() == b'abc'")
        peer.run("assert not view.flags.writeable")
        peer.run(
            "try: shared.copy_from(b'x')\n"
            "except ak.LifecycleError as error: assert 'read-only' in str(error)"
        )
        peer.channel.send(b"import ctypes; ctypes.memset(shared.address, 1, 1)")
        assert peer.channel.recv(1) == b""
        assert peer.end() == -signal.SIGSEGV
        target = bytearray(3)
        region.copy_to(target)
        assert target == b"abc"
    arena.close()
    assert host.live == {}


def test_what_cannot_be_exported_or_opened_is_refused(
    device: FaultyDevice, arena: ak.Arena, region: ak.Region
) -> None:
    plain = ak.Arena(device, capacity_bytes=GRANULE)
    with plain, plain.reserve(GRANULE, owner="a") as unshared:
        unshared.map()
        with pytest.raises(ValueError, match="exportable=True"):
            unshared.export_handles()
        unshared.unmap()  # nothing holds it
    with pytest.raises(ak.LifecycleError, match="nothing is mapped"):
        arena.reserve(GRANULE, owner="b").export_handles()
    with region.export_handles() as handles:
        other = ak.SharedHandles("other", SIZE, [])
        with pytest.raises(ValueError, match="other device"):
            ak.SharedRegion.open(device, other)
        fd = handles.fds[0]
        for size, ranges in [
            (SIZE, []),
            (SIZE, [(SIZE, 2 * GRANULE)]),
            (SIZE, [(1, 2 * GRANULE)]),
            (SIZE, [(0, 0)]),
            (SIZE + 1, [(0, 2 * GRANULE)]),
            (SIZE, [(0, 2 * GRANULE), (GRANULE, 2 * GRANULE)]),
        ]:
            bad = ak.SharedHandles(device.kind, size, [(os.dup(fd), *place) for place in ranges])
            with pytest.raises(ValueError, match="shared"), bad:
                ak.SharedRegion.open(device, bad)


@pytest.mark.parametrize(
    ("call", "n"),
    [
        ("mem_export", 1),
        ("mem_export", 3),
        ("address_reserve", 1),
        ("mem_import", 1),
        ("mem_import", 4),
        ("mem_map", 2),
        ("mem_set_access", 1),
        ("mem_set_access", 2),
    ],
)
def test_a_failure_leaves_nothing(
    device: FaultyDevice, region: ak.Region, call: str, n: int
) -> None:
    before, fds_before = device.live, num_descriptors()
    device.fail_call(n, call=call)
    with pytest.raises(ak.DriverError, match=call):  # noqa: SIM117 - either of the two
        with region.export_handles() as handles:
            ak.SharedRegion.open(device, handles)
    assert device.live == before
    assert num_descriptors() == fds_before
    region.unmap()


def test_a_failed_close_is_closed_again(device: FaultyDevice, region: ak.Region) -> None:
    before = device.live
    with region.export_handles() as handles:
        shared = ak.SharedRegion.open(device, handles)
    for call in ("mem_unmap", "address_free"):
        device.fail_call(1, call=call)
        with pytest.raises(ak.DriverError, match=call):
            shared.close()
    shared.close()
    assert device.live == before


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", EOFError),
        (b"AGSH0001\x10\0\0\0{", EOFError),
        (b"AGSH0002\0\0\0\0", ValueError),
        (b"AGSH0001\xff\xff\xff\xff", ValueError),
        (b"AGSH0001\x02\0\0\0{}", ValueError),
        (b"AGSH0001\x02\0\0\0\xff\xfe", ValueError),
        (
            b'AGSH0001\x39\0\0\0{"device_kind":"host","size_bytes":true,"ranges":[[0,1]]}',
            ValueError,
        ),
        (b'AGSH0001\x36\0\0\0{"device_kind":"host","size_bytes":1,"ranges":[[0,1]]}', EOFError),
        (b'AGSH0001\x36\0\0\0{"device_kind":"host","size_bytes":1,"ranges":[[0,1]]}x', ValueError),
    ],
)
def test_what_is_not_shared_handles_is_refused(sent: bytes, error: type[Exception]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(error):
            ak.SharedHandles.receive(ours)


def test_more_descriptors_than_one_message_takes_arrive_in_order() -> None:
    num_handles = 300  # Linux takes 253 a message
    with ak.Arena(
        ak.Device("host", memory_bytes=num_handles * GRANULE),
        capacity_bytes=num_handles * GRANULE,
        handle_bytes=GRANULE,
        exportable=True,
    ) as arena:
        region = arena.reserve(num_handles * GRANULE, owner="a")
        region.map()
        ours, theirs = socket.socketpair()
        with ours, theirs, region.export_handles() as sent:
            sent.send(ours)
            with ak.SharedHandles.receive(theirs) as received:
                assert received.ranges == sent.ranges
                assert [os.fstat(fd).st_ino for fd in received.fds] == [
                    os.fstat(fd).st_ino for fd in sent.fds
                ]
