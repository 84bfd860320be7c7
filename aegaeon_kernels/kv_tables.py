"""From where to where the pages of each plane go: what one call of a copier is told.

Offsets are relative to an anchor on either side, so that one table serves every packed buffer.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aegaeon_kernels.kv_layout import BlockPages, Plane


class Operation(enum.Enum):
    PACK = "pack"
    UNPACK = "unpack"
    MOVE = "move"


class Part(NamedTuple):
    """One allocation of a cache: where its bytes begin in the layout, and at which distance from
    the anchor, the first allocation's first byte.
    """

    layout_offset_bytes: int
    size_bytes: int
    distance_bytes: int


@dataclass(frozen=True, eq=False)
class PlaneTable:
    """Planes of one page size.

    rows: int64 (num_planes, 4), in bytes: source offset, source block stride, destination offset,
    destination block stride; a packed buffer's "block id" is the position in it.
    alignment: divides every number of the rows and the page size.
    """

    page_bytes: int
    rows: npt.NDArray[np.int64]
    alignment: int


@lru_cache(maxsize=256)
def plane_tables(
    pages: BlockPages, parts: tuple[Part, ...], operation: Operation
) -> tuple[PlaneTable, ...]:
    """One table for each page size. Raises ValueError for a plane that spans two allocations."""
    return tuple(
        _table(page_bytes, list(_rows(pages, page_bytes, planes, packed_offsets, parts, operation)))
        for page_bytes, planes, packed_offsets in pages.classes
    )


def _table(page_bytes: int, rows: list[tuple[int, int, int, int]]) -> PlaneTable:
    table = np.array(rows, dtype=np.int64)
    return PlaneTable(page_bytes, table, int(np.gcd.reduce(table, axis=None, initial=page_bytes)))


def _rows(
    pages: BlockPages,
    page_bytes: int,
    planes: tuple[Plane, ...],
    packed_offsets: tuple[int, ...],
    parts: tuple[Part, ...],
    operation: Operation,
) -> Iterator[tuple[int, int, int, int]]:
    begins = [part.layout_offset_bytes for part in parts]
    for plane, packed_offset in zip(planes, packed_offsets, strict=True):
        part = parts[bisect_right(begins, plane.offset_bytes) - 1]
        inside = plane.offset_bytes - part.layout_offset_bytes
        end = inside + (pages.num_blocks - 1) * plane.block_stride_bytes + page_bytes
        if end > part.size_bytes:
            raise ValueError(
                f"the plane at {plane.offset_bytes} of the layout ends {end - part.size_bytes} "
                "bytes behind the tensor it begins in; the tensors of a cache count as laid end to "
                "end, in the order given"
            )
        cache = (part.distance_bytes + inside, plane.block_stride_bytes)
        packed = (packed_offset, pages.bytes_per_block)
        if operation is Operation.PACK:
            yield *cache, *packed
        elif operation is Operation.UNPACK:
            yield *packed, *cache
        else:
            yield *cache, *cache
