"""Random block tables in every kind of layout, against numpy, with guards around all memory.

AEGAEON_BLOCK_TABLES says how many the Triton kernel copies in Triton's interpreter, over all
layouts; 10000 take some minutes. The native threads always copy 10000.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kv_support import (
    GUARD_BYTES,
    Sample,
    block_outermost,
    in_tensors,
    interpret,
    layer_outermost,
    overlaid,
    side_by_side,
)

import aegaeon_kernels as ak
from aegaeon_kernels.kv_layout import KVLayout, Plane

NUM_INTERPRETED = int(os.environ.get("AEGAEON_BLOCK_TABLES", "1600"))
NUM_NATIVE = 10_000
MOST_IDS = 3

GIB = 1 << 30


def far_apart(page: int, stride: int, layers: int, blocks: int = 24) -> Sample:
    """Blocks more than 4 GiB apart in one allocation; only their pages are ever touched."""
    size = layers * blocks * stride
    planes = tuple(Plane(layer * blocks * stride, stride) for layer in range(layers))
    return Sample((KVLayout(planes, page, blocks, size),), (size,))


# Few planes, since the interpreter takes milliseconds for each page.
LAYOUTS: dict[str, Sample] = {
    "per layer, NHD": layer_outermost(512, 2),
    "per layer, K and V halves, own allocations": in_tensors(layer_outermost(256, 4), 2),
    "per head, HND": layer_outermost(64, 3),
    "per layer, padded pages": layer_outermost(208, 2, stride=256),
    "block outermost": block_outermost(512, 3),
    "block outermost, gaps and padding": block_outermost(96, 2, gap=8, padding=48),
    "MLA, fp8 rows of 656 bytes": layer_outermost(656, 2),
    "fp8 with scales beside": side_by_side(layer_outermost(256, 1), layer_outermost(12, 1)),
    "hybrid, two page sizes": side_by_side(layer_outermost(512, 1), layer_outermost(352, 1)),
    "hybrid, groups overlay each other": overlaid((256, 3), (320, 2), (24, 5)),
    "mamba states beside attention": side_by_side(
        layer_outermost(1048, 1, stride=1056), block_outermost(128, 2, padding=16)
    ),
    "odd pages of 77 bytes": in_tensors(layer_outermost(77, 2), 2),
    "pages of 130 bytes": layer_outermost(130, 2),
    "several tiles a page, ragged end": layer_outermost(4096 * 2 + 1040, 1),
    "more than 4 GiB, in units of 16 bytes": far_apart(528, GIB + 16, 1),
    "more than 4 GiB, in units of 1 byte": far_apart(33, 500_000_003, 2),
}


class Memory:
    """One address range with guards around every page, and what numpy says it should hold.

    Allocations lie 64 bytes apart, each at a multiple of 16. Kept and compared are the bytes of
    pages and GUARD_BYTES on either side of each: in small caches that is everything.
    """

    def __init__(self, part_bytes: tuple[int, ...], watched: npt.NDArray[np.int64]) -> None:
        begins = []
        end = GUARD_BYTES
        for size in part_bytes:
            begins.append(end)
            end += (size + 15) // 16 * 16 + GUARD_BYTES
        # Reserved, not allocated: what is never touched takes no memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        tensor = torch.frombuffer(mmap.mmap(-1, end, flags=flags), dtype=torch.uint8)
        self.tensors = [
            tensor[begin : begin + size] for begin, size in zip(begins, part_bytes, strict=True)
        ]
        self._bytes = tensor.numpy()
        self._ends = np.cumsum(part_bytes)
        self._shifts = np.array(begins) - (self._ends - part_bytes)
        around = np.arange(-GUARD_BYTES, GUARD_BYTES + 1, 8)  # no page and gap is shorter
        self._watched = np.unique(self.index(watched.reshape(-1))[:, None] + around)
        self.expected = np.zeros(0, dtype=np.uint8)

    def index(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where bytes of the parts laid end to end are in the range."""
        part = np.searchsorted(self._ends, positions, side="right")
        return positions + self._shifts[part]

    def fill(self, random: np.random.Generator) -> None:
        self._bytes[self._watched] = random.integers(0, 256, self._watched.size, dtype=np.uint8)
        self.expected = self._bytes[self._watched]

    def read(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        return self._bytes[self.index(positions)]

    def expect(self, positions: npt.NDArray[np.int64], contents: npt.NDArray[np.uint8]) -> None:
        self.expected[np.searchsorted(self._watched, self.index(positions))] = contents

    def differs(self) -> npt.NDArray[np.int64]:
        return self._watched[self._bytes[self._watched] != self.expected]


def bytes_of_blocks(sample: Sample) -> npt.NDArray[np.int64]:
    """(blocks, bytes per block): ascending positions of each block's bytes, each once."""
    num_blocks = min(layout.num_blocks for layout in sample.layouts)
    blocks = []
    for block in range(num_blocks):
        pages = [
            np.arange(page := offset + block * stride, page + layout.block_bytes)
            for layout in sample.layouts
            for offset, stride in layout.planes
        ]
        blocks.append(np.unique(np.concatenate(pages)))
    return np.stack(blocks)


def check_tables(sample: Sample, backend: str, num_tables: int, seed: int) -> None:
    """By each table is packed, unpacked or moved; memory keeps what earlier ones have done."""
    random = np.random.default_rng(seed)
    positions = bytes_of_blocks(sample)
    num_blocks, per_block = positions.shape
    cache = Memory(sample.part_bytes, positions)
    packed = np.arange(MOST_IDS * per_block).reshape(MOST_IDS, per_block)
    buffer = Memory((packed.size + 5,), packed)
    cache.fill(random)
    buffer.fill(random)
    layouts, tensors, (flat,) = sample.layouts, cache.tensors, buffer.tensors

    def pack(ids: npt.NDArray[np.int64]) -> None:
        ids = random.choice(ids, ids.size)  # repeats allowed
        ak.kv.pack(tensors, ids, flat, layouts, backend=backend)
        buffer.expect(packed[: ids.size], cache.read(positions[ids]))

    def unpack(ids: npt.NDArray[np.int64]) -> None:
        contents = buffer.read(packed[: ids.size])
        ak.kv.unpack(flat, tensors, ids, layouts, backend=backend)
        cache.expect(positions[ids], contents)

    def move(ids: npt.NDArray[np.int64]) -> None:
        others = np.setdiff1d(np.arange(num_blocks), ids)
        others = random.choice(others, ids.size, replace=False)
        contents = cache.read(positions[ids])
        ak.kv.move(tensors, ids, others, layouts, backend=backend)
        cache.expect(positions[others], contents)

    operations: list[Callable[[npt.NDArray[np.int64]], None]] = [pack, unpack, move]
    for number in range(num_tables):
        operation = operations[random.integers(len(operations))]
        ids = random.choice(num_blocks, random.integers(1, MOST_IDS + 1), replace=False)
        operation(ids)
        for where, memory in (("cache", cache), ("buffer", buffer)):
            wrong = memory.differs()
            assert not wrong.size, (
                f"table {number}, {operation.__name__} of {ids}: byte {wrong[0]} of the {where}, "
                f"and {wrong.size - 1} more"
            )
        if number % 50 == 49:  # blocks have become alike
            cache.fill(random)
            buffer.fill(random)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_kernel_copies_random_block_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret(monkeypatch)
    check_tables(LAYOUTS[name], "triton", -(-NUM_INTERPRETED // len(LAYOUTS)), seed=len(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_native_threads_copy_random_block_tables(name: str) -> None:
    check_tables(LAYOUTS[name], "native", -(-NUM_NATIVE // len(LAYOUTS)), seed=len(name))
