"""Moving blocks of paged KV caches: pack, unpack and move in place, for any layout and dtype.

    ak.kv.pack(cache, block_ids, out, layout)       scattered blocks to one contiguous buffer
    ak.kv.unpack(buf, cache, block_ids, layout)     and back, to the same or to other blocks
    ak.kv.move(cache, src_ids, dst_ids, layout)     inside a cache, as compaction does
    ak.kv.plan_compaction(live_block_ids)           which blocks to move: kv_compact.py

A cache is one tensor, or several (one per layer, for example) that count as laid end to end, or a
region of an arena, fully mapped. A layout says where its blocks lie; where pages differ in size
there are several layouts of one cache (kv_layout.py). On CUDA tensors the Triton kernel of
kv_copy.py copies, ordered on the current stream; on CPU tensors native threads do, and all bytes
are there when the call returns. reference.py defines what is correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from aegaeon_kernels import _C
from aegaeon_kernels.kv_compact import Moves, MoveWaves, plan_compaction, plan_waves
from aegaeon_kernels.kv_layout import BlockPages, KVLayout, block_pages, packed_copies
from aegaeon_kernels.kv_tables import Operation, Part, PlaneTable, plane_tables
from aegaeon_kernels.views import MemoryViews

if TYPE_CHECKING:
    import torch

    Cache: TypeAlias = torch.Tensor | Sequence[torch.Tensor] | MemoryViews
    BlockIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor

__all__ = [
    "MoveWaves",
    "Moves",
    "bytes_per_block",
    "move",
    "pack",
    "packed_copies",
    "plan_compaction",
    "plan_waves",
    "unpack",
    "warm_up",
]

Layouts: TypeAlias = KVLayout | Sequence[KVLayout]
Backend: TypeAlias = Literal["triton", "native"]
_Ids: TypeAlias = "npt.NDArray[np.int64] | torch.Tensor"


def bytes_per_block(layout: Layouts) -> int:
    """The size of a packed block: all bytes of the block, each once, without gaps."""
    return _pages_of(layout).bytes_per_block


def pack(
    cache: Cache,
    block_ids: BlockIds,
    out: torch.Tensor,
    layout: Layouts,
    *,
    slots: BlockIds | None = None,
    check_ids: bool = True,
    max_ctas: int | None = None,
    num_threads: int | None = None,
    backend: Backend | None = None,
) -> int:
    """Copy blocks of a cache into one buffer, block after block; returns the bytes copied.

    cache:     the tensor(s) of the layouts' allocation; contiguous, any dtype, at least size_bytes;
               or the region that it is.
    block_ids: blocks in the order wanted, repeats allowed: a sequence, a numpy array or a CPU
               tensor of integers. A tensor on the cache's device needs `check_ids=False`.
    out:       contiguous, any dtype, on the cache's device, apart from the cache; its first
               `len(block_ids) * bytes_per_block(layout)` bytes are written. Packed block i holds
               the pages of block `block_ids[i]` in ascending order of their offset.
    layout:    the layout, or all layouts of this cache.
    slots:     where in the buffer, counted in packed blocks; distinct. None: 0, 1, 2, ...
    check_ids: False skips the checks of the ids, for those that come from a block pool or a planner
               that keeps them valid: a wrong id then reads, or overwrites, any memory.
    max_ctas:  CUDA: most programs at a time, so that other kernels run beside: 4 to 8 keep up with
               a PCIe 5 link. Launches then end after 64 MiB. None: the whole device.
    num_threads: CPU: threads to use. None: as many as the process may use, up to 8.
    backend:   "triton" or "native"; None: by device. "triton" takes CPU tensors where
               TRITON_INTERPRET=1 was set before the first use.

    Ordered on the current stream of the cache's device, without a host synchronisation; the ids
    have been copied when it returns. On the CPU it is done when it returns; other Python threads
    run meanwhile. Nothing is compiled after `warm_up` of the same layout and alignment.
    Raises ValueError, before anything is copied.
    """
    pages = _pages_of(layout)
    anchor, parts = _parts_of(cache, pages)
    ids = _checked_ids("block_ids", block_ids, pages, anchor, check_ids, distinct=False)
    places, num_slots = _checked_slots(slots, ids, anchor, check_ids, distinct=True)
    _require_buffer("out", out, anchor, parts, num_slots * pages.bytes_per_block)
    _copy(
        plane_tables(pages, parts, Operation.PACK),
        anchor,
        out,
        _moves(ids, places),
        max_ctas,
        num_threads,
        backend,
    )
    return len(ids) * pages.bytes_per_block


def unpack(
    buf: torch.Tensor,
    cache: Cache,
    block_ids: BlockIds,
    layout: Layouts,
    *,
    slots: BlockIds | None = None,
    check_ids: bool = True,
    max_ctas: int | None = None,
    num_threads: int | None = None,
    backend: Backend | None = None,
) -> int:
    """Copy packed blocks into a cache: packed block i to block `block_ids[i]`; the inverse of pack.

    block_ids: distinct. slots: repeats allowed. Everything else as for `pack`.
    """
    pages = _pages_of(layout)
    anchor, parts = _parts_of(cache, pages)
    ids = _checked_ids("block_ids", block_ids, pages, anchor, check_ids, distinct=True)
    places, num_slots = _checked_slots(slots, ids, anchor, check_ids, distinct=False)
    _require_buffer("buf", buf, anchor, parts, num_slots * pages.bytes_per_block)
    _copy(
        plane_tables(pages, parts, Operation.UNPACK),
        buf,
        anchor,
        _moves(places, ids),
        max_ctas,
        num_threads,
        backend,
    )
    return len(ids) * pages.bytes_per_block


def move(
    cache: Cache,
    src_ids: BlockIds,
    dst_ids: BlockIds,
    layout: Layouts,
    *,
    check_ids: bool = True,
    max_ctas: int | None = None,
    num_threads: int | None = None,
    backend: Backend | None = None,
) -> int:
    """Copy block `src_ids[i]` over block `dst_ids[i]` inside a cache; returns the bytes copied.

    dst_ids: distinct, and none of them among src_ids: then the copies are independent and run in
             any order. `plan_compaction` gives such lists, `plan_waves` cuts any moves into such.
    Reads and writes each byte once: 2 * len(src_ids) * bytes_per_block of traffic. Everything else
    as for `pack`; max_ctas of 16 to 32 suits compaction beside decoding.
    """
    pages = _pages_of(layout)
    anchor, parts = _parts_of(cache, pages)
    sources = _checked_ids("src_ids", src_ids, pages, anchor, check_ids, distinct=False)
    destinations = _checked_ids("dst_ids", dst_ids, pages, anchor, check_ids, distinct=True)
    if len(sources) != len(destinations):
        raise ValueError(f"{len(sources)} src_ids for {len(destinations)} dst_ids")
    if check_ids:
        _require_apart(np.asarray(sources), np.asarray(destinations))
    _copy(
        plane_tables(pages, parts, Operation.MOVE),
        anchor,
        anchor,
        _moves(sources, destinations),
        max_ctas,
        num_threads,
        backend,
    )
    return len(sources) * pages.bytes_per_block


def warm_up(cache: Cache, buf: torch.Tensor, layout: Layouts) -> None:
    """Compile and load what pack, unpack and move of these need: serving never waits for it.

    One launch each, without blocks: no byte changes. `buf` stands for every packed buffer whose
    address is a multiple of the same power of two (up to 16). On CPU tensors nothing is to be done.
    """
    pages = _pages_of(layout)
    anchor, parts = _parts_of(cache, pages)
    _require_buffer("buf", buf, anchor, parts, 0)
    if anchor.device.type == "cuda":
        nothing = np.empty((0, 2), dtype=np.int64)
        sides = {
            Operation.PACK: (anchor, buf),
            Operation.UNPACK: (buf, anchor),
            Operation.MOVE: (anchor, anchor),
        }
        for operation, (source, destination) in sides.items():
            tables = plane_tables(pages, parts, operation)
            _copy_with_triton(tables, source, destination, nothing, None)


def _pages_of(layout: Layouts) -> BlockPages:
    return block_pages((layout,) if isinstance(layout, KVLayout) else tuple(layout))


def _parts_of(cache: Cache, pages: BlockPages) -> tuple[torch.Tensor, tuple[Part, ...]]:
    """The tensor that offsets count from, and the allocations."""
    if isinstance(cache, MemoryViews):
        import torch

        cache = cache.tensor((cache.size_bytes,), torch.uint8)
    several = not hasattr(cache, "data_ptr")
    tensors = list(cast("Sequence[torch.Tensor]", cache if several else [cache]))
    if not tensors:
        raise ValueError("cache is an empty list of tensors")
    anchor = tensors[0]
    parts = []
    num_bytes = 0
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(
                f"a cache tensor of shape {tuple(tensor.shape)} is not contiguous: pass the "
                "allocation that it is a view of"
            )
        if tensor.device != anchor.device:
            raise ValueError(f"cache tensors on {anchor.device} and {tensor.device}")
        parts.append(Part(num_bytes, tensor.nbytes, tensor.data_ptr() - anchor.data_ptr()))
        num_bytes += tensor.nbytes
    if num_bytes < pages.size_bytes:
        raise ValueError(
            f"the cache has {num_bytes} bytes, its layout {pages.size_bytes}: pass the whole "
            "allocation"
        )
    return anchor, tuple(parts)


def _require_buffer(
    name: str,
    buffer: torch.Tensor,
    anchor: torch.Tensor,
    parts: Sequence[Part],
    num_bytes: int,
) -> None:
    if buffer.device != anchor.device:
        raise ValueError(
            f"{name} is on {buffer.device}, the cache on {anchor.device}: pack on the cache's "
            "device, and copy the packed buffer in one piece"
        )
    if not buffer.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(buffer.shape)} is not contiguous")
    if buffer.nbytes < num_bytes:
        raise ValueError(
            f"{name} has {buffer.nbytes} bytes, the blocks need {num_bytes}: see bytes_per_block"
        )
    begin = buffer.data_ptr() - anchor.data_ptr()
    for part in parts:
        if begin < part.distance_bytes + part.size_bytes and part.distance_bytes < (
            begin + buffer.nbytes
        ):
            raise ValueError(f"{name} overlaps the cache: a packed buffer is memory of its own")


def _checked_slots(
    slots: BlockIds | None, ids: _Ids, anchor: torch.Tensor, check: bool, *, distinct: bool
) -> tuple[_Ids, int]:
    """Slots, and how many a buffer must have; of slots that are not checked, those of the ids."""
    if slots is None:
        return _positions(ids), len(ids)
    places = _checked_ids("slots", slots, None, anchor, check, distinct=distinct)
    if len(places) != len(ids):
        raise ValueError(f"{len(places)} slots for {len(ids)} block_ids")
    if not check or not len(places):
        return places, len(ids)
    return places, int(np.asarray(places).max()) + 1


def _checked_ids(
    name: str,
    ids: BlockIds,
    pages: BlockPages | None,
    anchor: torch.Tensor,
    check: bool,
    *,
    distinct: bool,
) -> _Ids:
    """Ids as int64 on the host, or as they are on the device. One sort is all the checks cost."""
    if hasattr(ids, "data_ptr"):
        tensor = cast("torch.Tensor", ids)
        if tensor.device.type != "cpu":
            if check or tensor.device != anchor.device:
                raise ValueError(
                    f"{name} on {tensor.device} cannot be checked without waiting for the device: "
                    f"pass them from the host, or valid ones on {anchor.device} and check_ids=False"
                )
            return tensor
        ids = tensor.numpy()
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} has to be a list of integers, got {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.int64, copy=False)
    if check and array.size:
        ascending = np.sort(array)
        what = "slot" if pages is None else "block"
        if pages is None and ascending[0] < 0:
            raise ValueError(f"{name} {ascending[0]}..{ascending[-1]} are negative")
        if pages is not None and (ascending[0] < 0 or ascending[-1] >= pages.num_blocks):
            raise ValueError(
                f"{name} {ascending[0]}..{ascending[-1]} are outside a cache of "
                f"{pages.num_blocks} blocks"
            )
        if distinct and (repeats := ascending[1:][ascending[1:] == ascending[:-1]]).size:
            raise ValueError(f"{name} names {what} {repeats[0]} twice: a {what} has one content")
    return array


def _require_apart(sources: npt.NDArray[np.int64], destinations: npt.NDArray[np.int64]) -> None:
    both = np.intersect1d(sources, destinations)
    if both.size:
        raise ValueError(
            f"block {both[0]} is a source and a destination of one move: cut the moves into "
            "independent ones with plan_waves"
        )


def _positions(ids: _Ids) -> _Ids:
    """The positions of blocks in their packed buffer, where the ids are."""
    if isinstance(ids, np.ndarray):
        return np.arange(len(ids))
    import torch

    return torch.arange(len(ids), device=ids.device)


def _moves(sources: _Ids, destinations: _Ids) -> _Ids:
    """(num_moves, 2)"""
    if isinstance(sources, np.ndarray) and isinstance(destinations, np.ndarray):
        return np.stack((sources, destinations), axis=1)
    import torch

    pair = [torch.as_tensor(ids, dtype=torch.int64) for ids in (sources, destinations)]
    device = next(ids.device for ids in pair if ids.device.type != "cpu")
    return torch.stack([ids.to(device) for ids in pair], dim=1)


def _copy(
    tables: Sequence[PlaneTable],
    source: torch.Tensor,
    destination: torch.Tensor,
    moves: _Ids,
    max_ctas: int | None,
    num_threads: int | None,
    backend: Backend | None,
) -> None:
    kind = source.device.type
    for name, value in (("max_ctas", max_ctas), ("num_threads", num_threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} has to be at least 1")
    if backend is None:
        backend = "triton" if kind == "cuda" else "native"
    if backend == "native" and kind != "cpu":
        raise ValueError(f"native threads copy in CPU memory, not on {source.device}")
    if backend not in ("native", "triton"):
        raise ValueError(f'unknown backend {backend!r}: expected "triton" or "native"')
    if len(moves) == 0:
        return
    if backend == "triton":
        _copy_with_triton(tables, source, destination, moves, max_ctas)
    else:
        _copy_with_threads(
            tables, source, destination, moves, num_threads or _C.default_num_threads()
        )


def _copy_with_triton(
    tables: Sequence[PlaneTable],
    source: torch.Tensor,
    destination: torch.Tensor,
    moves: _Ids,
    max_ctas: int | None,
) -> None:
    # Imported where it is used: triton is large, and absent where only the CPU is.
    from aegaeon_kernels import kv_copy

    kv_copy.copy_pages(tables, source, destination, moves, max_ctas=max_ctas)


def _copy_with_threads(
    tables: Sequence[PlaneTable],
    source: torch.Tensor,
    destination: torch.Tensor,
    moves: _Ids,
    num_threads: int,
) -> None:
    anchors = np.array([source.data_ptr(), 0, destination.data_ptr(), 0], dtype=np.int64)
    for table in tables:
        _C.copy_pages(
            planes=table.rows + anchors,
            page_bytes=table.page_bytes,
            moves=np.asarray(moves),
            num_threads=num_threads,
        )
