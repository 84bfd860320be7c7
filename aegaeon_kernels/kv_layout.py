"""Where the blocks of a paged KV cache lie in memory, as planes; no torch, no engine.

A *plane* is one run of equally spaced pages: page `b` starts at `offset_bytes + b *
block_stride_bytes` of the cache's allocation. Layers, K/V halves and head groups are planes, so
per-layer layouts (stride == page) and block-outermost layouts (stride == all pages of a block) are
the same thing with other numbers, and a mover needs to know nothing else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    Raises ValueError for a page outside the allocation or a stride shorter than a page.
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
