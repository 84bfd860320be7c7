"""What only a GPU and a framework on it can show: torch's memory pools, cupy's arrays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_support import GRANULE, MIB

import aegaeon_kernels as ak

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and torch for it"),
]


@pytest.fixture
def arena() -> Iterator[ak.Arena]:
    arena = ak.Arena(ak.Device("cuda:0"), capacity_bytes=512 * MIB, handle_bytes=16 * GRANULE)
    yield arena
    torch.cuda.empty_cache()
    arena.close()


def test_what_torch_allocates_lies_in_the_region(arena: ak.Arena) -> None:
    region = arena.reserve(256 * MIB, owner="model", tag="weights")
    pool = ak.TorchPool(region)
    with pool.use():
        inside = [torch.full((size,), 3.0, device="cuda") for size in (10, MIB, 9 * MIB)]
    outside = torch.ones(10, device="cuda")
    for tensor in inside:
        assert region.address <= tensor.data_ptr() < region.address + region.size_bytes
    assert not region.address <= outside.data_ptr() < region.address + region.size_bytes
    assert arena.stats().owners[("model", "weights")] == region.mapped_bytes > 0
    assert all((tensor == 3).all() for tensor in inside)
    del inside, tensor, pool
    torch.cuda.empty_cache()
    assert region.mapped_bytes == 0


def test_out_of_memory_is_torchs_own_error_and_not_the_last_word(arena: ak.Arena) -> None:
    region = arena.reserve(1024 * MIB, owner="model")
    pool = ak.TorchPool(region)
    with pool.use():
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(600 * MIB, dtype=torch.uint8, device="cuda")
            tensor = torch.ones(100 * MIB, dtype=torch.uint8, device="cuda")
            assert tensor.sum(dtype=torch.int64) == 100 * MIB
            del tensor
        assert "cannot map" in pool.stats().last_failure
    del pool


def test_tensors_see_their_bytes_again_after_an_eviction(arena: ak.Arena) -> None:
    region = arena.reserve(256 * MIB, owner="model")
    pool = ak.TorchPool(region)
    with pool.use():
        weights = torch.arange(MIB, device="cuda")
    backup = weights.cpu()
    address, ranges = weights.data_ptr(), region.mapped_ranges()
    torch.cuda.synchronize()
    region.unmap()
    for offset, size in ranges:
        region.map(offset, size)
    weights.copy_(backup)
    assert weights.data_ptr() == address
    assert torch.equal(weights.cpu(), backup)
    del weights, pool


def test_a_graph_captured_into_the_pool_replays_after_an_eviction(arena: ak.Arena) -> None:
    region = arena.reserve(256 * MIB, owner="model")
    pool = ak.TorchPool(region)
    source = torch.arange(1000, device="cuda", dtype=torch.float32)
    with pool.use():
        (source * 2).sum()  # what is loaded lazily is loaded before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool.id):
            result = source * 2
    assert region.address <= result.data_ptr() < region.address + region.size_bytes
    ranges = region.mapped_ranges()
    torch.cuda.synchronize()
    region.unmap()
    for offset, size in ranges:
        region.map(offset, size)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, source * 2)
    del graph, result, pool


def test_a_cupy_array_is_the_memory_and_keeps_it(arena: ak.Arena) -> None:
    cupy = pytest.importorskip("cupy")
    region = arena.reserve(16 * MIB, owner="model")
    region.map()
    array = region.cupy((3, 5), "f4", 64)
    assert array.data.ptr == region.address + 64
    array[...] = cupy.arange(15, dtype="f4").reshape(3, 5)
    cupy.cuda.Device().synchronize()
    host = bytearray(60)
    region.copy_to(host, 64)
    assert host == cupy.asnumpy(array).tobytes()
    tensor = region.tensor((3, 5), torch.float32, 64)
    assert torch.equal(tensor.cpu(), torch.arange(15.0).reshape(3, 5))
    other = torch.full((100,), 7, dtype=torch.uint8, device="cuda")
    region.copy_from(other)
    assert (region.tensor((100,), torch.uint8) == 7).all()
    with pytest.raises(ak.LifecycleError, match="view"):
        region.close()
    del array, tensor
    region.close()
