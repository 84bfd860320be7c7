"""Which blocks of a paged cache to move where: pure planning over block ids, in linear time.

Knows ids only. Who runs the moves (`kv.move`), and when block tables follow, is the caller's
business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

_Ids: TypeAlias = npt.NDArray[np.int64]
_AnyIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]


class Moves(NamedTuple):
    """Block `src_ids[i]` goes to block `dst_ids[i]`; int64 arrays of equal length."""

    src_ids: _Ids
    dst_ids: _Ids


def plan_compaction(
    live_block_ids: _AnyIds,
    *,
    pinned_block_ids: _AnyIds = (),
    end_block: int | None = None,
) -> Moves:
    """The fewest moves after which every live block lies below `end_block`.

    live_block_ids:   blocks in use, distinct, in any order.
    pinned_block_ids: blocks that stay where they are and are not overwritten, live or not: a DMA
                      reads them, or the engine reserves them.
    end_block:        None: the smallest possible, that is the number of live and pinned blocks, or
                      one behind the last pinned block.

    Only blocks at or above the end move, to free blocks below it, so no block is both a source and
    a destination: one `kv.move` runs them all, in any order. Both lists ascend, which keeps
    neighbours together. Nothing happens to the sources: until block tables name the destinations,
    the moves can be dropped. Raises ValueError when an id is negative or live twice, and for an
    end_block that the blocks do not fit below.

    Cost: linear in the largest id (1e6 blocks: some milliseconds).
    """
    live = _as_ids("live_block_ids", live_block_ids)
    pinned = _as_ids("pinned_block_ids", pinned_block_ids)
    last_pinned = int(pinned.max(initial=-1))
    size = 1 + max(int(live.max(initial=-1)), last_pinned)
    _require_distinct("live_block_ids", live, size)
    movable = np.zeros(size, dtype=bool)
    movable[live] = True
    movable[pinned] = False
    taken = movable.copy()
    taken[pinned] = True
    num_taken = int(np.count_nonzero(taken))
    fewest = max(num_taken, last_pinned + 1)
    if end_block is None:
        end_block = fewest
    elif end_block < fewest:
        raise ValueError(
            f"end_block={end_block} is too low for {num_taken} live and pinned blocks, the last "
            f"pinned one {last_pinned}: the lowest possible is {fewest}"
        )
    sources = np.flatnonzero(movable[end_block:]) + end_block
    holes = np.flatnonzero(~taken[:end_block])
    return Moves(sources, holes[: sources.size])


@dataclass(frozen=True, eq=False)
class MoveWaves:
    """Moves in an order that never overwrites what is still to be read.

    moves:  all of them, wave after wave, those through scratch blocks included.
    starts: int64 (num_waves + 1): wave w is `moves[starts[w]:starts[w + 1]]`. Iterating gives the
            waves; the moves of one are independent, one `kv.move` runs them.
    """

    moves: Moves
    starts: _Ids

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[Moves]:
        for begin, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            yield Moves(self.moves.src_ids[begin:end], self.moves.dst_ids[begin:end])


def plan_waves(src_ids: _AnyIds, dst_ids: _AnyIds, *, scratch_block_ids: _AnyIds = ()) -> MoveWaves:
    """Moves as if all at once: block `dst_ids[i]` gets what block `src_ids[i]` had before.

    src_ids, dst_ids:  distinct each; a block may be in both. Moves of a block to itself are
                       dropped.
    scratch_block_ids: blocks whose content is of no use, in neither list. One suffices for any
                       permutation; without cycles none is needed.

    A chain (a to b, b to c) takes one wave per move, its last first. A cycle takes one move more:
    one block waits in a scratch block. Cycles that share a scratch block come one after the other,
    so that more scratch blocks give fewer waves; the number of moves stays the least possible.
    Raises ValueError for repeated ids, and for cycles without a scratch block.

    Cost: linear in the largest id and the moves (1e6 moves: about a second).
    """
    sources, destinations = _as_ids("src_ids", src_ids), _as_ids("dst_ids", dst_ids)
    scratch = _as_ids("scratch_block_ids", scratch_block_ids)
    if sources.size != destinations.size:
        raise ValueError(f"{sources.size} src_ids for {destinations.size} dst_ids")
    stays = sources == destinations
    num_ids = 1 + max(int(ids.max(initial=-1)) for ids in (sources, destinations, scratch))
    _require_distinct("src_ids", sources, num_ids)
    _require_distinct("dst_ids", destinations, num_ids)
    _require_distinct("scratch_block_ids", scratch, num_ids)
    involved = np.zeros(num_ids, dtype=bool)
    involved[sources] = involved[destinations] = True
    if involved[scratch].any():
        raise ValueError(
            f"scratch block {scratch[involved[scratch]][0]} is itself moved or overwritten"
        )
    sources, destinations = sources[~stays], destinations[~stays]

    # The move that a move makes room for: the one whose destination is this one's source.
    writer = np.full(num_ids, -1)
    writer[destinations] = np.arange(destinations.size)
    reader = np.full(num_ids, -1)
    reader[sources] = np.arange(sources.size)
    follower = writer[sources].tolist()
    wave = [-1] * sources.size
    for at in np.flatnonzero(reader[destinations] < 0).tolist():  # ends of chains
        number = 0
        while at >= 0:
            wave[at] = number
            number += 1
            at = follower[at]

    # What has no number yet lies on cycles. Block `sources[first]` waits in a scratch block while
    # the others follow each other into the place it left; its move comes last, from there.
    sources, destinations = sources.copy(), destinations.copy()
    saved_src: list[int] = []
    saved_dst: list[int] = []
    saved_wave: list[int] = []
    free_at = [0] * scratch.size
    for first, number in enumerate(wave):
        if number >= 0:
            continue
        if not free_at:
            raise ValueError(
                f"block {sources[first]} is on a cycle of moves: scratch_block_ids has to name a "
                "block that may be overwritten"
            )
        slot = len(saved_src) % scratch.size
        number = free_at[slot]
        saved_src.append(int(sources[first]))
        saved_dst.append(int(scratch[slot]))
        saved_wave.append(number)
        at = follower[first]
        while at != first:
            number += 1
            wave[at] = number
            at = follower[at]
        wave[first] = number + 1
        sources[first] = scratch[slot]
        free_at[slot] = number + 2

    waves = np.array([*saved_wave, *wave], dtype=np.int64)
    order = np.argsort(waves, kind="stable")
    moves = Moves(
        np.concatenate((np.array(saved_src, dtype=np.int64), sources))[order],
        np.concatenate((np.array(saved_dst, dtype=np.int64), destinations))[order],
    )
    return MoveWaves(moves, np.concatenate(([0], np.cumsum(np.bincount(waves)))))


def _as_ids(name: str, ids: _AnyIds) -> _Ids:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} has to be a list of integers, got {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.int64, copy=False)
    if array.size and array.min() < 0:
        raise ValueError(f"{name} has the negative id {array.min()}")
    return array


def _require_distinct(name: str, ids: _Ids, num_ids: int) -> None:
    counts = np.bincount(ids, minlength=num_ids)
    if counts.max(initial=0) > 1:
        raise ValueError(f"{name} names block {counts.argmax()} more than once")
