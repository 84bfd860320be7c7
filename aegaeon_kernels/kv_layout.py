"""Where the blocks of a paged KV cache lie in memory, as planes; no torch, no engine.

A *plane* is one run of equally spaced pages: page `b` starts at `offset_bytes + b *
block_stride_bytes` of the cache's allocation. Layers, K/V halves and head groups are planes, so
per-layer layouts (stride == page) and block-outermost layouts (stride == all pages of a block) are
the same thing with other numbers, and a mover needs to know nothing else.

Layers whose pages differ in size (hybrid models, scales beside quantised values) are several
layouts of one allocation and one set of block ids. Where an engine lets cache groups overlay each
other, they share bytes of the same block; `block_pages` has every byte of a block once.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Plane(NamedTuple):
    """Page `b` of this plane starts at `offset_bytes + b * block_stride_bytes`."""

    offset_bytes: int
    block_stride_bytes: int


class ByteRange(NamedTuple):
    """`size_bytes` bytes from `offset_bytes` on; what `Prefetcher.load(order=...)` takes."""

    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class KVLayout:
    """A paged KV cache: `num_blocks` blocks, each one page of `block_bytes` in every plane.

    size_bytes: the size of the cache's allocation; every page must lie inside it.
    Raises ValueError for a page outside the allocation, a stride shorter than a page, and pages of
    different blocks that overlap.
    """

    planes: tuple[Plane, ...]
    block_bytes: int
    num_blocks: int
    size_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "planes", tuple(Plane(*plane) for plane in self.planes))
        if self.block_bytes < 1 or self.num_blocks < 1 or not self.planes:
            raise ValueError(
                f"a KV layout needs planes, blocks and bytes, got {len(self.planes)} planes, "
                f"{self.num_blocks} blocks of {self.block_bytes} bytes"
            )
        for offset_bytes, block_stride_bytes in self.planes:
            end = offset_bytes + (self.num_blocks - 1) * block_stride_bytes + self.block_bytes
            if block_stride_bytes < self.block_bytes:
                raise ValueError(
                    f"pages overlap: block stride {block_stride_bytes} is shorter than a page of "
                    f"{self.block_bytes} bytes"
                )
            if offset_bytes < 0 or end > self.size_bytes:
                raise ValueError(
                    f"plane at {offset_bytes} ends at {end}, outside the cache of "
                    f"{self.size_bytes} bytes"
                )
        block_pages((self,))

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all planes."""
        return self.block_bytes * len(self.planes)

    def ranges(self, block_ids: Sequence[int]) -> list[ByteRange]:
        """The bytes of `block_ids` (in any order, duplicates allowed), ascending and merged.

        Neighbouring blocks of one plane become one range, and so do planes that touch or overlay
        each other. Raises ValueError for an id outside the cache.
        """
        return merged_ranges([self], block_ids)


class PageClass(NamedTuple):
    """Planes whose pages have one size, and where each plane's page lies in a packed block."""

    page_bytes: int
    planes: tuple[Plane, ...]
    packed_offsets: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BlockPages:
    """The bytes of a block, each once, in as few pages as possible.

    A *packed* block is these pages one after the other, in ascending order of their offset in
    block 0; packed blocks follow each other without a gap.
    """

    classes: tuple[PageClass, ...]
    bytes_per_block: int
    num_blocks: int
    size_bytes: int


@lru_cache(maxsize=256)
def block_pages(layouts: tuple[KVLayout, ...]) -> BlockPages:
    """What a mover copies of each block, for layouts that share one allocation and the block ids.

    Pages of a block that touch or overlay each other become one page. Raises ValueError when
    different blocks share bytes, and without layouts.
    """
    if not layouts:
        raise ValueError("at least one KV layout is needed")
    num_blocks = min(layout.num_blocks for layout in layouts)
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for layout in layouts:
        for offset_bytes, block_stride_bytes in layout.planes:
            spans[block_stride_bytes].append((offset_bytes, offset_bytes + layout.block_bytes))
    pages = sorted(
        (start, stride, end - start)
        for stride, group in spans.items()
        for start, end in _joined(group, touching=num_blocks > 1)
    )
    _require_disjoint(np.array(pages, dtype=np.int64), num_blocks)
    planes: dict[int, list[Plane]] = defaultdict(list)
    packed_offsets: dict[int, list[int]] = defaultdict(list)
    bytes_per_block = 0
    for offset_bytes, block_stride_bytes, page_bytes in pages:
        planes[page_bytes].append(Plane(offset_bytes, block_stride_bytes))
        packed_offsets[page_bytes].append(bytes_per_block)
        bytes_per_block += page_bytes
    return BlockPages(
        classes=tuple(
            PageClass(page_bytes, tuple(planes[page_bytes]), tuple(packed_offsets[page_bytes]))
            for page_bytes in planes
        ),
        bytes_per_block=bytes_per_block,
        num_blocks=num_blocks,
        size_bytes=max(layout.size_bytes for layout in layouts),
    )


def _joined(spans: list[tuple[int, int]], *, touching: bool) -> list[tuple[int, int]]:
    """Spans that overlap, and those that touch if asked to, as one.

    With one block the stride means nothing, so that planes of different tensors may touch.
    """
    spans = sorted(spans)
    joined = [spans[0]]
    for start, end in spans[1:]:
        first, reach = joined[-1]
        if start < reach or (touching and start == reach):
            joined[-1] = (first, max(reach, end))
        else:
            joined.append((start, end))
    return joined


def _require_disjoint(pages: npt.NDArray[np.int64], num_blocks: int) -> None:
    """pages: (num_planes, 3): offset, block stride, page bytes; ascending. One block's are disjoint
    where strides are equal.
    """
    offset, stride, size = pages[:, 0], pages[:, 1], pages[:, 2]
    too_long = np.flatnonzero((size > stride) & (num_blocks > 1))
    if too_long.size:
        raise _overlap(pages[too_long[0]], pages[too_long[0]])
    # Only planes whose extents overlap can collide: for per-layer tensors, none.
    reach = np.searchsorted(offset, offset + (num_blocks - 1) * stride + size)
    counts = reach - np.arange(len(pages)) - 1
    first = np.repeat(np.arange(len(pages)), counts)
    second = first + 1 + np.arange(first.size) - np.repeat(np.cumsum(counts) - counts, counts)
    same = stride[first] == stride[second]
    for a, b in zip(first[~same], second[~same], strict=True):
        if _collide(pages[a], pages[b], num_blocks):
            raise _overlap(pages[a], pages[b])
    # Equal strides: block i of the first meets block i - k of the second.
    first, second = first[same], second[same]
    apart = offset[second] - offset[first]
    nearest = (apart - size[first]) // stride[first] + 1
    farthest = -(-(apart + size[second]) // stride[first]) - 1
    collide = np.flatnonzero(nearest <= np.minimum(farthest, num_blocks - 1))
    if collide.size:
        raise _overlap(pages[first[collide[0]]], pages[second[collide[0]]])


def _collide(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], num_blocks: int) -> bool:
    """Whether any page of one plane overlaps any page of the other."""
    blocks = np.arange(num_blocks)
    starts, others = a[0] + blocks * a[1], b[0] + blocks * b[1]
    following = np.searchsorted(others + b[2], starts, side="right")
    inside = following < num_blocks
    return bool((others[following[inside]] < starts[inside] + a[2]).any())


def _overlap(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> ValueError:
    return ValueError(
        f"pages of different blocks overlap: {a[2]} bytes every {a[1]} from offset {a[0]} on, and "
        f"{b[2]} bytes every {b[1]} from {b[0]} on"
    )


def packed_copies(
    layouts: tuple[KVLayout, ...],
    block_ids: Sequence[int] | npt.NDArray[np.int64],
    slots: Sequence[int] | npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """The copies between blocks of a cache and slots of a packed buffer, as few as possible.

    block_ids, slots: of equal length; block `block_ids[i]` belongs to the packed block at `slots[i]
    * bytes_per_block`. Returns (num_copies, 3): offset in the cache, offset in the packed buffer,
    bytes; ascending in the packed buffer, and merged where copies continue each other on both
    sides. Raises ValueError for an id outside the cache and lists of different lengths.
    """
    pages = block_pages(layouts)
    ids, places = np.asarray(block_ids, dtype=np.int64), np.asarray(slots, dtype=np.int64)
    if ids.shape != places.shape or ids.ndim != 1:
        raise ValueError(f"{ids.size} block ids and {places.size} slots have to be two equal lists")
    if ids.size == 0:
        return np.empty((0, 3), dtype=np.int64)
    if ids.min() < 0 or ids.max() >= pages.num_blocks:
        raise ValueError(
            f"block ids {ids.min()}..{ids.max()} are outside a cache of {pages.num_blocks} blocks"
        )
    if places.min() < 0:
        raise ValueError(f"slots {places.min()}..{places.max()} are negative")
    cache, packed, size = (
        np.concatenate(parts)
        for parts in zip(
            *(
                (
                    offset_bytes + ids * block_stride_bytes,
                    packed_offset + places * pages.bytes_per_block,
                    np.full(ids.size, page_class.page_bytes),
                )
                for page_class in pages.classes
                for (offset_bytes, block_stride_bytes), packed_offset in zip(
                    page_class.planes, page_class.packed_offsets, strict=True
                )
            ),
            strict=True,
        )
    )
    order = np.argsort(packed, kind="stable")
    cache, packed, size = cache[order], packed[order], size[order]
    continues = (cache[1:] == cache[:-1] + size[:-1]) & (packed[1:] == packed[:-1] + size[:-1])
    firsts = np.concatenate(([0], np.flatnonzero(~continues) + 1))
    return np.stack((cache[firsts], packed[firsts], np.add.reduceat(size, firsts)), axis=1)


def merged_ranges(layouts: Iterable[KVLayout], block_ids: Sequence[int]) -> list[ByteRange]:
    """The bytes of `block_ids` in caches that share one allocation and one set of block ids.

    Cost: O(planes * blocks) in numpy, plus a sort of the runs.
    """
    ids = np.unique(np.asarray(block_ids, dtype=np.int64))
    if ids.size == 0:
        return []
    starts: list[npt.NDArray[np.int64]] = []
    ends: list[npt.NDArray[np.int64]] = []
    run_starts, run_lengths = _runs(ids)
    for layout in layouts:
        if ids[0] < 0 or ids[-1] >= layout.num_blocks:
            raise ValueError(
                f"block ids {ids[0]}..{ids[-1]} are outside a cache of {layout.num_blocks} blocks"
            )
        for offset_bytes, block_stride_bytes in layout.planes:
            if block_stride_bytes == layout.block_bytes:
                first = offset_bytes + run_starts * block_stride_bytes
                starts.append(first)
                ends.append(first + run_lengths * block_stride_bytes)
            else:
                first = offset_bytes + ids * block_stride_bytes
                starts.append(first)
                ends.append(first + layout.block_bytes)
    return _merge(np.concatenate(starts), np.concatenate(ends))


def unused_ranges(
    layouts: Iterable[KVLayout], num_blocks: int, *, size_bytes: int, alignment_bytes: int
) -> list[ByteRange]:
    """What the first `num_blocks` blocks leave free of an allocation of size_bytes; ascending.

    Of planes that lie one behind the other, each leaves its end. Ranges begin and end at multiples
    of alignment_bytes, or at the end of the allocation. What lies between pages of one plane counts
    as used. Raises ValueError for num_blocks < 1.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks={num_blocks}: without blocks all of it is free")
    extents = sorted(
        (offset, offset + (num_blocks - 1) * stride + layout.block_bytes)
        for layout in layouts
        for offset, stride in layout.planes
    )
    ranges: list[ByteRange] = []
    used_until = 0
    for start, end in (*extents, (size_bytes, size_bytes)):
        first = -(-used_until // alignment_bytes) * alignment_bytes
        last = start if start == size_bytes else start // alignment_bytes * alignment_bytes
        if last > first:
            ranges.append(ByteRange(first, last - first))
        used_until = max(used_until, end)
    return ranges


def _runs(ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts and lengths of the runs of consecutive numbers in ascending unique `ids`."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    firsts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((firsts, [ids.size])))
    return ids[firsts], lengths


def _merge(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> list[ByteRange]:
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reach = np.maximum.accumulate(ends)
    firsts = np.concatenate(([0], np.flatnonzero(starts[1:] > reach[:-1]) + 1))
    lasts = np.concatenate((firsts[1:] - 1, [starts.size - 1]))
    return [
        ByteRange(start, end - start)
        for start, end in zip(starts[firsts].tolist(), reach[lasts].tolist(), strict=True)
    ]
