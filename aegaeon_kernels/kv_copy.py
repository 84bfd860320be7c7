"""The Triton kernel that copies pages between two sets of planes, and its launcher.

One kernel serves pack, unpack and move in every layout: they are the same copy with other tables.
What a block or a packed buffer is, and every check, is in `kv.py`; this module copies what it is
told to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from aegaeon_kernels.kv_tables import PlaneTable

# Bytes per thread and tile: four accesses of 16 bytes in flight.
BYTES_PER_THREAD = 64
TILE_BYTES = (16384, 8192, 4096)
# Enough threads to hide memory latency: on an H200, 2.15 TB/s of reads x 0.7 us = 11.4 KB in flight
# per multiprocessor, and this many threads have 64 KiB.
THREADS_PER_MULTIPROCESSOR = 1024
# A launch that runs beside others gives its multiprocessors back after so much (PegaFlow #422: one
# launch of several GB raised the p99 between tokens from 156 to 706 ms).
CAPPED_LAUNCH_BYTES = 64 << 20
# Tile numbers are int32 in the kernel; half of the range, since adding the grid must not wrap.
MAX_TILES = 1 << 30


@triton.jit(
    do_not_specialize=["planes", "moves", "num_moves", "page_units", "tiles_per_page", "num_tiles"]
)  # type: ignore[untyped-decorator]
def copy_pages_kernel(  # type: ignore[no-untyped-def]
    src,
    dst,
    planes,
    moves,
    num_moves,
    page_units,
    tiles_per_page,
    num_tiles,
    WORDS_PER_UNIT: tl.constexpr,  # noqa: N803
    TILE_WORDS: tl.constexpr,  # noqa: N803
):
    """dst[d + w] = src[s + w] for every word w of every page, with

        s = source offset[plane] + source id[move] * source stride[plane], d likewise, in units.

    src, dst: anchors, pointers to words.
    planes:   int64 (num_planes, 4): source offset, source stride, destination offset, destination
              stride; in units of WORDS_PER_UNIT words, relative to the anchors.
    moves:    int64 (num_moves, 2): source id, destination id.

    Offsets are int64, because a cache is larger than 4 GiB. They are counted in units and
    multiplied by a constant, so that the compiler proves the alignment of every access; a table of
    pointers or of bytes proves 8 bytes at best. A `while` loop, because Triton 3.6 with numpy 2.4
    cannot interpret `range` over run-time values.
    """
    lane = tl.arange(0, TILE_WORDS)
    t = tl.program_id(0)
    while t < num_tiles:
        page = t // tiles_per_page
        tile = t - page * tiles_per_page
        plane = page // num_moves
        move = page - plane * num_moves
        row = planes + plane * 4
        src_id = tl.load(moves + move * 2)
        dst_id = tl.load(moves + move * 2 + 1)
        s = tl.load(row) + src_id * tl.load(row + 1)
        d = tl.load(row + 2) + dst_id * tl.load(row + 3)
        first = tile.to(tl.int64) * TILE_WORDS
        inside = lane < page_units.to(tl.int64) * WORDS_PER_UNIT - first
        # Neither side is read again soon: the cache is left to what runs beside.
        words = tl.load(
            src + (s * WORDS_PER_UNIT + first) + lane, mask=inside, eviction_policy="evict_first"
        )
        tl.store(
            dst + (d * WORDS_PER_UNIT + first) + lane,
            words,
            mask=inside,
            eviction_policy="evict_first",
        )
        t += tl.num_programs(0)


class Unit(NamedTuple):
    """What all offsets, strides and sizes of a copy are multiples of, and its words."""

    num_bytes: int
    word: Any
    word_bytes: int

    @property
    def words(self) -> int:
        return self.num_bytes // self.word_bytes


UNITS = (
    Unit(16, tl.int32, 4),
    Unit(8, tl.int64, 8),
    Unit(4, tl.int32, 4),
    Unit(2, tl.int16, 2),
    Unit(1, tl.uint8, 1),
)


def unit_of(*values: int) -> Unit:
    """The largest unit that divides all of the values."""
    common = math.gcd(*values)
    return next(unit for unit in UNITS if common % unit.num_bytes == 0)


def tile_bytes_of(page_bytes: int) -> int:
    """The tile that wastes the fewest lanes on a page's ragged end; the larger of equal ones."""
    if page_bytes <= TILE_BYTES[-1]:
        return max(1 << (page_bytes - 1).bit_length(), 32)
    return min(TILE_BYTES, key=lambda tile: (-(-page_bytes // tile) * tile, -tile))


def copy_pages(
    tables: Sequence[PlaneTable],
    src: torch.Tensor,
    dst: torch.Tensor,
    moves: npt.NDArray[np.int64] | torch.Tensor,
    *,
    max_ctas: int | None,
) -> None:
    """Copy the page of every plane of every table for every move, on the current stream.

    src, dst: tensors whose first bytes the tables' offsets count from, on one device.
    moves:    int64 (num_moves, 2), on the host or on that device: source id, destination id.
    max_ctas: most programs at a time, for running beside other kernels; launches then end after
              CAPPED_LAUNCH_BYTES.
    Raises ValueError for CPU tensors, unless the kernel is interpreted.
    """
    if src.device.type == "cpu" and isinstance(copy_pages_kernel, triton.JITFunction):
        raise ValueError(
            "the Triton kernel is compiled for GPUs: for tensors on the CPU use the native "
            "backend, or set TRITON_INTERPRET=1 before the first copy"
        )
    with torch.cuda.device(src.device) if src.device.type == "cuda" else nullcontext():
        _launch_all(tables, src, dst, _on_device(moves, src.device), max_ctas)


def _launch_all(
    tables: Sequence[PlaneTable],
    src: torch.Tensor,
    dst: torch.Tensor,
    moves: torch.Tensor,
    max_ctas: int | None,
) -> None:
    for table in tables:
        unit = unit_of(table.alignment, src.data_ptr(), dst.data_ptr())
        tile_bytes = tile_bytes_of(table.page_bytes)
        tiles_per_page = -(-table.page_bytes // tile_bytes)
        num_warps = max(1, min(8, tile_bytes // (32 * BYTES_PER_THREAD)))
        num_planes = len(table.rows)
        device_rows = _in_units(table, unit.num_bytes, src.device)
        most_ctas = max_ctas or _resident_ctas(src.device, num_warps)
        for some in _launches(moves, num_planes * tiles_per_page, tile_bytes, max_ctas is not None):
            num_tiles = len(some) * num_planes * tiles_per_page
            copy_pages_kernel[(max(1, min(num_tiles, most_ctas)),)](
                triton.reinterpret(src, unit.word),
                triton.reinterpret(dst, unit.word),
                device_rows,
                some,
                len(some),
                table.page_bytes // unit.num_bytes,
                tiles_per_page,
                num_tiles,
                WORDS_PER_UNIT=unit.words,
                TILE_WORDS=tile_bytes // unit.word_bytes,
                num_warps=num_warps,
            )


def _on_device(moves: npt.NDArray[np.int64] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting for the device: by way of pinned memory, which torch keeps for reuse."""
    if isinstance(moves, torch.Tensor):
        return moves
    if device.type == "cpu":
        return torch.from_numpy(moves)
    pinned = torch.empty(moves.shape, dtype=torch.int64, pin_memory=True)
    pinned.numpy()[:] = moves
    return pinned.to(device, non_blocking=True)


def _launches(
    moves: torch.Tensor, tiles_per_move: int, tile_bytes: int, capped: bool
) -> Iterator[torch.Tensor]:
    """The moves of each launch; one launch without moves if there are none, for warming up."""
    most_tiles = min(MAX_TILES, CAPPED_LAUNCH_BYTES // tile_bytes if capped else MAX_TILES)
    most_moves = max(1, most_tiles // tiles_per_move)
    for begin in range(0, max(1, len(moves)), most_moves):
        yield moves[begin : begin + most_moves]


@lru_cache(maxsize=1024)
def _in_units(table: PlaneTable, unit_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(table.rows // unit_bytes).to(device)


def _resident_ctas(device: torch.device, num_warps: int) -> int:
    """A persistent grid: as many programs as keep the device's memory busy."""
    if device.type != "cuda":  # Triton's interpreter
        return 4
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * max(1, THREADS_PER_MULTIPROCESSOR // (32 * num_warps))
