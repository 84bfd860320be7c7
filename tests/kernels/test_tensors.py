"""Tensors over a region: the same bytes, seen by torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_support import GRANULE, MIB, StubCuda

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def new_region(device: ak.Device) -> ak.Region:
    arena = ak.Arena(device, capacity_bytes=4 * GRANULE)
    region = arena.reserve(4 * GRANULE, owner="a", tag="kv")
    region.map()
    return region


@pytest.fixture
def region(host: FaultyDevice) -> ak.Region:
    return new_region(host)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_is_the_memory_at_its_offset(region: ak.Region, dtype: torch.dtype) -> None:
    offset = GRANULE - 64
    tensor = region.tensor((3, 5, 7), dtype, offset)
    assert tensor.data_ptr() == region.address + offset
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 5, 7), dtype, True)
    assert tensor.device.type == "cpu"
    values = torch.arange(105).reshape(3, 5, 7).to(dtype)
    tensor.copy_(values)
    raw = np.from_dlpack(region)[offset : offset + 105 * dtype.itemsize]
    wanted = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    assert (raw == wanted).all()


def test_shapes_of_all_ranks(region: ak.Region) -> None:
    for dtype in (torch.float32, torch.float8_e4m3fn):
        scalar = region.tensor((), dtype)
        assert (scalar.shape, scalar.numel()) == ((), 1)
        assert region.tensor([2, 1, 3, 1], dtype, 4).stride() == (3, 3, 1, 1)
    assert region.tensor((GRANULE,), torch.float32).nbytes == region.size_bytes


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((GRANULE + 1,), 0), ((1,), 4 * GRANULE), ((1,), 2), ((1,), -4), ((0,), 0), ((-1,), 0)],
)
def test_what_does_not_fit_is_the_callers_mistake(
    region: ak.Region, shape: tuple[int, ...], offset: int
) -> None:
    with pytest.raises(ValueError, match="offset"):
        region.tensor(shape, torch.float32, offset)


def test_only_mapped_memory_has_tensors(region: ak.Region) -> None:
    region.unmap(GRANULE, GRANULE)
    region.tensor((GRANULE,), torch.uint8)
    for offset in (GRANULE - 4, GRANULE):
        with pytest.raises(ak.LifecycleError, match="not mapped"):
            region.tensor((8,), torch.uint8, offset)
    with pytest.raises(ak.LifecycleError, match="not mapped"):
        np.from_dlpack(region)
    region.close()
    with pytest.raises(ak.LifecycleError, match="closed"):
        region.tensor((1,), torch.uint8)


def test_a_tensor_shows_the_memory_of_the_moment(region: ak.Region) -> None:
    tensor = region.tensor((GRANULE,), torch.uint8)
    tensor.fill_(5)
    region.unmap()
    region.map()
    assert (tensor == 5).all()


def test_a_tensor_keeps_the_region_and_its_address(host: FaultyDevice) -> None:
    region = new_region(host)
    tensor = region.tensor((10,), torch.float32)
    address = region.address
    del region
    tensor.fill_(1)
    assert host.live["mappings"] == 4
    assert tensor.data_ptr() == address
    del tensor
    assert host.live == {}


def test_a_closed_regions_address_stays_taken_while_a_tensor_lives(host: FaultyDevice) -> None:
    region = new_region(host)
    tensor = region.tensor((10,), torch.float32)
    region.close(abandon_views=True)
    assert host.live == {"reservations": 1, "handles": 4}
    del tensor
    del region
    assert host.live == {}


def test_numpy_and_torch_take_a_region_as_it_is(region: ak.Region) -> None:
    array = np.from_dlpack(region)
    assert (array.shape, array.dtype, array.flags.writeable) == ((4 * GRANULE,), np.uint8, True)
    array[:] = 9
    tensor = torch.from_dlpack(region)
    assert (tensor == 9).all()
    assert region.__dlpack_device__() == (1, 0)


def test_a_capsule_nobody_takes_gives_its_hold_back(host: FaultyDevice, region: ak.Region) -> None:
    for version in (None, (1, 0)):
        capsule = region.__dlpack__(max_version=version)
        assert ("versioned" in repr(capsule)) == (version is not None)
        del capsule
    region.close()
    assert "reservations" not in host.live


def test_a_region_on_a_gpu_says_so(stub_cuda: StubCuda) -> None:
    arena = ak.Arena(ak.Device("cuda:0", library=stub_cuda.path), capacity_bytes=8 * MIB)
    with arena, arena.reserve(2 * MIB, owner="a") as region:
        assert region.__dlpack_device__() == (2, 0)
