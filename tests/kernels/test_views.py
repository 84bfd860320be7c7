"""Arrays of other libraries over a region, copies both ways, and what they mean for close()."""

from __future__ import annotations

import array
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import GRANULE, DeviceBytes, StubCuda, assert_ledger, pattern

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

SIZE = 4 * GRANULE


@pytest.fixture
def arena(device: FaultyDevice) -> Iterator[ak.Arena]:
    arena = ak.Arena(device, capacity_bytes=2 * SIZE)
    yield arena
    arena.close()


@pytest.fixture
def region(arena: ak.Arena) -> ak.Region:
    region = arena.reserve(SIZE, owner="a", tag="kv")
    region.map()
    return region


@pytest.fixture
def host_region(host: FaultyDevice) -> ak.Region:
    region = ak.Arena(host, capacity_bytes=2 * SIZE).reserve(SIZE, owner="a")
    region.map()
    return region


@pytest.mark.parametrize("dtype", ["u1", "i8", "f2", "f4", "c16", "?", "i4,f8", "S12"])
def test_a_numpy_array_is_the_memory_at_its_offset(host_region: ak.Region, dtype: str) -> None:
    item = np.dtype(dtype).itemsize
    offset = 100_000 * item
    view = host_region.numpy((3, 5), dtype, offset)
    assert (view.shape, view.dtype, view.flags.c_contiguous) == ((3, 5), np.dtype(dtype), True)
    assert view.ctypes.data == host_region.address + offset
    raw = pattern(15 * item, seed=3) & 1  # a bool is 0 or 1
    host_region.numpy(raw.shape, "u1", offset)[:] = raw
    assert view.tobytes() == raw.tobytes()
    assert host_region.numpy((), dtype).shape == ()


def test_what_numpy_cannot_see_is_refused(host_region: ak.Region, stub_cuda: StubCuda) -> None:
    for shape, dtype, offset in [((1,), "f4", 2), ((SIZE + 1,), "u1", 0), ((0,), "u1", 0)]:
        with pytest.raises(ValueError, match="offset"):
            host_region.numpy(shape, dtype, offset)
    with pytest.raises(ValueError, match="Python objects"):
        host_region.numpy((1,), object)
    with pytest.raises(ValueError, match="use numpy"):
        host_region.cupy((1,), "u1")
    device = ak.Device("cuda:0", library=stub_cuda.path)
    with ak.Arena(device, capacity_bytes=GRANULE) as arena:
        region = arena.reserve(GRANULE, owner="a")
        region.map()
        with pytest.raises(ValueError, match="use cupy"):
            region.numpy((1,), "u1")
    host_region.unmap()
    with pytest.raises(ak.LifecycleError, match="not mapped"):
        host_region.numpy((1,), "u1")


def in_bytearray(data: bytes) -> bytearray:
    return bytearray(data)


def in_mmap(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


def in_array(data: bytes) -> array.array[int]:
    return array.array("I", data)


def in_numpy(data: bytes) -> Any:
    return np.frombuffer(data, np.complex64).reshape(2, -1).copy()


def in_torch(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(4, -1)


@pytest.mark.parametrize("make", [in_bytearray, in_mmap, in_array, in_numpy, in_torch])
def test_bytes_go_in_and_come_out(
    region: ak.Region, device_bytes: DeviceBytes, make: Any, device: FaultyDevice
) -> None:
    data = pattern(1 << 20, seed=1)
    before = device.live
    offset = GRANULE - 4321
    region.copy_from(make(data.tobytes()), offset)
    assert (device_bytes.read(region.address + offset, data.nbytes) == data).all()
    assert (device_bytes.read(region.address, offset) == 0).all()
    target = make(bytes(data.nbytes))
    region.copy_to(target, offset)
    got = (
        target if isinstance(target, torch.Tensor) else torch.frombuffer(target, dtype=torch.uint8)
    )
    assert got.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == data.tobytes()
    assert device.live == before


def test_a_region_is_copied_into_another(
    arena: ak.Arena, region: ak.Region, device_bytes: DeviceBytes
) -> None:
    data = pattern(SIZE, seed=2)
    device_bytes.write(region.address, data)
    other = arena.reserve(SIZE, owner="b")
    other.map()
    other.copy_from(region)
    assert (device_bytes.read(other.address, SIZE) == data).all()
    device_bytes.fill(region.address, 0, SIZE)
    other.copy_to(region)
    assert (device_bytes.read(region.address, SIZE) == data).all()
    for copy in (region.copy_from, region.copy_to):
        with pytest.raises(ValueError, match="overlaps"):
            copy(region)


def test_what_cannot_be_copied_is_refused(region: ak.Region, device: FaultyDevice) -> None:
    wide = np.zeros((4, 4), np.uint8)
    for source, message in [
        (bytes(SIZE + 1), "does not fit"),
        (b"", "empty"),
        (wide[:, :2], "contiguous"),
        (torch.zeros(4, 4)[:, :2], "contiguous"),
        ("text", "neither"),
    ]:
        with pytest.raises(ValueError, match=message):
            region.copy_from(source)
    with pytest.raises(ValueError, match="offset"):
        region.copy_from(b"x", -1)
    with pytest.raises(BufferError):
        region.copy_from(torch.zeros(4, requires_grad=True))
    for target in (b"const", np.broadcast_to(np.uint8(1), 1)):
        with pytest.raises(ValueError, match="read-only"):
            region.copy_to(target)
    region.protect()
    with pytest.raises(ak.LifecycleError, match="read-only"):
        region.copy_from(b"abc")
    with region.writable():
        region.copy_from(b"abc")
    target = bytearray(3)
    region.copy_to(target)
    assert target == b"abc"
    region.unmap()
    for copy in (region.copy_from, region.copy_to):
        with pytest.raises(ak.LifecycleError, match="not mapped"):
            copy(bytearray(3))


@pytest.mark.parametrize("call", ["memcpy_h2d_async", "stream_create", "stream_synchronize"])
def test_a_copy_that_fails_says_so_and_leaves_nothing(
    region: ak.Region, device: FaultyDevice, call: str
) -> None:
    before = device.live
    device.fail_call(1, call=call)
    with pytest.raises(ak.DriverError, match=call):
        region.copy_from(b"abc")
    assert device.live == before
    region.unmap()  # no use of it is left behind


def views(region: ak.Region) -> list[Any]:
    return [
        region.tensor((4,), torch.float32),
        region.numpy((4,), "f4"),
        np.from_dlpack(region)[5:9],
        torch.from_dlpack(region).view(2, -1)[1],
    ]


def test_close_refuses_while_a_view_is_alive(host: FaultyDevice, host_region: ak.Region) -> None:
    alive = views(host_region)
    while alive:
        with pytest.raises(ak.LifecycleError, match=rf"{len(alive)} view\(s\)"):
            host_region.close()
        with pytest.raises(ak.LifecycleError, match=r"view\(s\)"):
            host_region.arena.close()
        assert not host_region.closed
        np.asarray(alive.pop())[...] = 1  # it is usable all the while
    arena = host_region.arena
    assert assert_ledger(arena).owned_bytes == SIZE
    host_region.close()
    arena.close()
    assert host.live == {}


@pytest.mark.parametrize("whole_arena", [False, True])
def test_views_can_be_abandoned(host: FaultyDevice, whole_arena: bool) -> None:
    arena = ak.Arena(host, capacity_bytes=2 * SIZE)
    region = arena.reserve(SIZE, owner="a")
    region.map()
    alive = views(region)
    (arena if whole_arena else region).close(abandon_views=True)
    assert region.closed
    arena.close()
    assert host.live == {"reservations": 1}, "its address is nobody else's"
    alive.clear()
    del region
    assert host.live == {}


@pytest.mark.parametrize("index", range(4))
def test_a_view_alone_keeps_all_that_is_needed(host: FaultyDevice, index: int) -> None:
    region = ak.Arena(host, capacity_bytes=SIZE).reserve(SIZE, owner="a")
    region.map()
    view = views(region)[index]
    del region
    np.asarray(view)[...] = 7
    assert (np.asarray(view) == 7).all()
    assert host.live["mappings"] > 0
    del view
    assert host.live == {}


def test_an_error_on_its_way_is_not_replaced(host: FaultyDevice) -> None:
    def fail(region: ak.Region) -> None:
        view = region.numpy((4,), "u1")  # the traceback will hold it
        raise KeyError(str(view))

    arena = ak.Arena(host, capacity_bytes=SIZE)
    region = arena.reserve(SIZE, owner="a")
    region.map()
    with pytest.raises(KeyError) as caught, arena, region:
        fail(region)
    assert [note[:10] for note in caught.value.__notes__] == ["not closed"] * 2
    del caught
    assert not region.closed
    region.close()
    arena.close()
    assert host.live == {}


def test_a_block_that_ends_well_is_not_left_quietly_while_a_view_is_alive(
    host: FaultyDevice,
) -> None:
    arena = ak.Arena(host, capacity_bytes=SIZE)
    region = arena.reserve(SIZE, owner="a")
    region.map()
    view = region.numpy((4,), "u1")
    with pytest.raises(ak.LifecycleError, match="1 view"), region:
        assert view.shape == (4,)
    del view
    arena.close()
