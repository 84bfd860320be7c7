"""What the Triton kernel is compiled to for GPUs: read in its PTX, without a GPU.

The launcher runs as it is, and Triton's own just-in-time compiler decides what to compile; only
instead of being launched, kernels are kept. ptxas has to accept them too.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import triton
from kv_support import (
    SAMPLES,
    Sample,
    block_outermost,
    in_tensors,
    layer_outermost,
    side_by_side,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import aegaeon_kernels as ak
from aegaeon_kernels import kv, kv_copy
from aegaeon_kernels.kv_tables import Operation, plane_tables

CAPABILITIES = (80, 90, 100)


class NoDevice:
    """A Triton driver that knows what to compile for, and has nothing to run it on."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """In the kernel's place: compiles what a launch would, and keeps it."""

    def __init__(self) -> None:
        kernel = kv_copy.copy_pages_kernel
        self._jit = triton.jit(kernel.fn, do_not_specialize=kernel.do_not_specialize)
        self.num_launches = 0
        self.compiled: dict[Any, Any] = {}  # by what Triton distinguishes

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.num_launches += 1
            self._jit.warmup(*arguments, grid=grid, **options)
            self.compiled = self._jit.device_caches[0][0]

        return launch


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def compiler(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiler:
    # One cache for the session, away from the user's: a kernel of an earlier source is not met.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # without it Triton 3.9 warns
    compiler = Compiler()
    monkeypatch.setattr(kv_copy, "copy_pages_kernel", compiler)
    monkeypatch.setattr(driver, "_active", NoDevice(request.param))
    return compiler


def memory(*sizes: int) -> list[torch.Tensor]:
    """Never touched, and at multiples of 16, as torch allocates on every device."""
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def copy_all(sample: Sample, num_ids: int = 3, **options: Any) -> None:
    """pack, unpack and move of any ids: nothing is copied, so they need not be valid."""
    per_block = ak.kv.bytes_per_block(sample.layouts)
    cache, buffer = memory(*sample.part_bytes), memory(num_ids * per_block)[0]
    ids = np.arange(num_ids)
    options |= {"check_ids": False, "backend": "triton"}
    ak.kv.pack(cache, ids, buffer, sample.layouts, **options)
    ak.kv.unpack(buffer, cache, ids, sample.layouts, **options)
    ak.kv.move(cache, ids, ids, sample.layouts, **options)


def widths(ptx: str, access: str) -> list[int]:
    """Bytes of each such access (`ld` or `st`) of the blocks, which bypasses the cache."""
    found = re.findall(rf"\b{access}\.global\.L1::evict_first\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


def table_loads(ptx: str) -> list[str]:
    return re.findall(r"\bld\.global\.(?!L1)(\S+)", ptx)


# Blocks of 16 tokens, 8 heads of 128 bf16 values, if nothing else is said.
ALIGNED = {
    "per layer, NHD": layer_outermost(65536, 4, blocks=5),
    "per layer, K and V halves": layer_outermost(32768, 8, blocks=5),
    "per layer, HND, heads apart": layer_outermost(4096, 16, blocks=5),
    "per layer, own allocations": in_tensors(layer_outermost(65536, 4, blocks=5), 4),
    "block outermost": block_outermost(512 << 10, 1, blocks=5),
    "block outermost, gaps between layers": block_outermost(32768, 4, gap=64, blocks=5),
    "MLA, fp8 rows of 656 bytes": layer_outermost(64 * 656, 3, blocks=5),
    "MLA, bf16 rows of 1152 bytes": layer_outermost(16 * 1152, 3, blocks=5),
    "fp8 with scales beside": side_by_side(
        layer_outermost(16384, 4, blocks=5), layer_outermost(512, 4, blocks=5)
    ),
    "hybrid, two page sizes": side_by_side(
        layer_outermost(32768, 2, blocks=5), layer_outermost(24576, 1, blocks=5)
    ),
    "mamba states": block_outermost((1 << 20) + 12288, 1, padding=4096, blocks=5),
    "pages of 512 bytes": layer_outermost(512, 3, blocks=5),
    "odd pages of 13 units": layer_outermost(13 * 16 * 3, 3, blocks=5),
    "pages of 2 MiB": layer_outermost(2 << 20, 1, blocks=5),
}


def test_every_aligned_layout_is_copied_16_bytes_at_a_time(compiler: Compiler) -> None:
    for sample in ALIGNED.values():
        copy_all(sample)
    assert len(compiler.compiled) == 5, "tiles of 512 bytes, 1, 4, 8 and 16 KiB"
    for key, kernel in compiler.compiled.items():
        ptx = kernel.asm["ptx"]
        loads, stores = widths(ptx, "ld"), widths(ptx, "st")
        assert len(loads) == len(stores) >= 1, key
        assert set(loads) == set(stores) == {16}, key
        assert ptx.count("st.global") == len(stores), "nothing else is stored"
        assert ptx.count(".local") == 0, "no register is spilled to the stack"


def test_each_thread_has_four_accesses_in_flight(compiler: Compiler) -> None:
    copy_all(ALIGNED["per layer, NHD"])
    (kernel,) = compiler.compiled.values()
    accesses = re.findall(r"\b(ld|st)\.global\.L1", kernel.asm["ptx"])
    assert accesses == ["ld"] * 4 + ["st"] * 4, "all loads before the first store"


def test_addresses_are_computed_in_64_bits(compiler: Compiler) -> None:
    """A cache is larger than 4 GiB, and than 2^31 units."""
    for sample in SAMPLES.values():
        copy_all(sample)
    for key, kernel in compiler.compiled.items():
        ptx = kernel.asm["ptx"]
        # Offset and stride of both sides, and both ids.
        assert table_loads(ptx) == ["b64"] * 6, key
        # id * stride + offset, on both sides.
        assert len(re.findall(r"\b(?:mad|mul)\.lo\.s64", ptx)) >= 2, key
        assert not re.findall(r"\bcvt\.[us]32\.[us]64", ptx), f"an offset is cut to 32 bits: {key}"


@pytest.mark.parametrize("unit", [8, 4, 2, 1])
def test_an_unaligned_layout_is_copied_as_wide_as_it_is_aligned(
    unit: int, compiler: Compiler
) -> None:
    copy_all(layer_outermost(4096 + unit, 2, blocks=4))
    (kernel,) = compiler.compiled.values()
    for access in ("ld", "st"):
        assert set(widths(kernel.asm["ptx"], access)) == {unit}


def test_one_kernel_serves_all_caches_and_block_tables_of_a_tile(compiler: Compiler) -> None:
    """Nothing is compiled while serving: counts, strides and sizes are no reason to."""
    for layers, blocks, stride in ((1, 2, 0), (7, 16, 0), (16, 5, 16384 + 16), (3, 40, 32768)):
        sample = layer_outermost(16384, layers, blocks=blocks, stride=stride)
        for num_ids in (1, 2, 15, 16, 17, 100):
            copy_all(sample, num_ids)
    for page in (5 * 16384, 16 * 16384, 2 << 20):  # and other numbers of tiles
        copy_all(layer_outermost(page, 2, blocks=2), max_ctas=4)
    copy_all(block_outermost(16384, 5, padding=48, blocks=4), 1000, max_ctas=1)
    assert len(compiler.compiled) == 1
    assert compiler.num_launches > 75


def test_a_launch_without_blocks_compiles_what_serving_will_need(compiler: Compiler) -> None:
    """As warm_up makes it."""
    for name in ("fp8 with scales beside", "per layer, own allocations", "hybrid, two page sizes"):
        sample = ALIGNED[name]
        pages = kv._pages_of(sample.layouts)
        anchor, parts = kv._parts_of(memory(*sample.part_bytes), pages)
        (buffer,) = memory(ak.kv.bytes_per_block(sample.layouts))
        for operation, src, dst in (
            (Operation.PACK, anchor, buffer),
            (Operation.UNPACK, buffer, anchor),
            (Operation.MOVE, anchor, anchor),
        ):
            tables = plane_tables(pages, parts, operation)
            nothing = torch.empty((0, 2), dtype=torch.int64)
            kv_copy.copy_pages(tables, src, dst, nothing, max_ctas=None)
        known = set(compiler.compiled)
        for num_ids in (1, 16, 33):
            copy_all(sample, num_ids)
            copy_all(sample, num_ids, max_ctas=8)
        assert set(compiler.compiled) == known, name
