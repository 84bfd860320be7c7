"""The residency of one model: its states, and the two things it keeps on the device.

A model has a *weights* unit (immutable: evicting it is dropping it, the host image is the truth)
and a *KV* unit (mutable: evicting it copies out what the host does not have yet; shrinking it gives
back what no live block needs). Each unit has its own stable virtual range; units come and go one by
one, a model runs when both are resident.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import aegaeon_kernels as ak
from aegaeon.core.errors import AegaeonError
from aegaeon.switching.kv_store import BlockShape, HostKVStore
from aegaeon_kernels.kv_compact import Moves
from aegaeon_kernels.kv_layout import ByteRange, KVLayout, unused_ranges

# Smaller goes first: what a switch waits for overtakes what is brought in ahead of its turn.
SWITCH_PRIORITY = 0
AHEAD_PRIORITY = 1


class ModelState(enum.Enum):
    """COLD: on disk only. HOST: host images are complete. RESIDENT: may be stepped. FAILED: for
    good; holds no device memory.
    """

    COLD = "cold"
    HOST = "host"
    LOADING = "loading"
    RESIDENT = "resident"
    EVICTING = "evicting"
    FAILED = "failed"


class CannotMove(AegaeonError):
    """The blocks of a KV cache could not be moved on the device, for a reason that is not the
    arena's: a kernel that does not compile, no memory for its tables. They are where they were.

    Handled by the switcher, which evicts the cache instead of shrinking it.
    """


class Unit(ABC):
    """A device range and what stands for it on the host. `resident` only when the bytes are right.

    Saves and loads are started, waited for by the caller, and then finished or given up: exactly
    one of the two, and not before the last copy is over.
    """

    tag: str

    def __init__(self, region: ak.Region) -> None:
        self.region = region
        # Mapped memory whose bytes are not (yet) the model's does not count as resident.
        self._valid = False
        self._added: list[ByteRange] = []  # what the last `map` has mapped, until all is well

    @property
    def size_bytes(self) -> int:
        return self.region.size_bytes

    @property
    def mapped_bytes(self) -> int:
        return self.region.mapped_bytes

    @property
    def resident(self) -> bool:
        """All of it is on the device: its model may run."""
        return self._valid and self.mapped_bytes == self.size_bytes

    @property
    def holds_bytes(self) -> bool:
        """What its model needs is on the device, if not all that it needs to run."""
        return self._valid

    @abstractmethod
    def move_cost_bytes(self) -> int:
        """Bytes to copy if this unit is evicted now and wanted again."""

    def shrunk_bytes(self) -> int:
        """What it would hold if it gave back what it does not need; mapped_bytes: all it holds."""
        return self.mapped_bytes

    def start_save(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        """Begin to copy out what exists only on the device; None when there is nothing."""
        return None

    def finish_save(self) -> None:  # noqa: B027 - of weights there is nothing to save
        """All bytes are on the host."""

    def give_up_save(self) -> None:  # noqa: B027
        """Some bytes are not: what was being written on the host is worth nothing."""

    def unmap(self) -> None:
        """Give the memory back; the address range stays.

        On failure nothing has changed, unless the way back failed too and bytes are lost: then it
        is not resident, and holds nothing, until it has been mapped and loaded again.
        """
        if self.region.mapped_bytes:
            try:
                self.region.unmap()
            except ak.DriverError as error:
                if error.lost_contents:
                    self._valid = False
                raise
        self._valid = False
        self._added = []

    def map(self) -> None:
        """Map what is not mapped, all of it or nothing; what is mapped keeps its bytes."""
        self._added = []
        at = 0
        gaps: list[ByteRange] = []
        for offset, size in (*self.region.mapped_ranges(), (self.size_bytes, 0)):
            if offset > at:
                gaps.append(ByteRange(at, offset - at))
            at = offset + size
        if not gaps:
            return
        with self.region.arena.transaction() as transaction:
            for offset, size in gaps:
                # What is read is loaded or, of new KV blocks, zeroed by the engine before that.
                transaction.map(self.region, offset, size, contents="preserve")
        self._added = gaps

    def undo_map(self) -> None:
        """After a `map` that led to nothing: as before it, as far as that is of use."""
        self.unmap()

    @abstractmethod
    def start_load(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        """Begin to copy in from the host; None when there is nothing to copy."""

    def finish_load(self) -> None:
        """The copy has ended well: the bytes are the model's."""
        self._valid = True
        self._added = []

    def give_up_load(self) -> None:
        """The copy has failed: what is on the device is worth nothing."""
        self._valid = False

    def close(self) -> None:
        """Give back device memory, address range and host memory.

        The engine's tensors over the region may still be there; nobody runs them any more.
        """
        self.region.close(abandon_views=True)
        self._valid = False


class WeightsUnit(Unit):
    """image: the weights in device layout; it goes with this object."""

    tag = "weights"

    def __init__(self, region: ak.Region, image: ak.HostImage) -> None:
        super().__init__(region)
        self.image = image
        self._ahead: ak.Ticket | None = None

    def move_cost_bytes(self) -> int:
        return self.image.size_bytes

    @property
    def loading_ahead(self) -> bool:
        """A load that nobody waits for yet is under way, or has ended well."""
        return self._ahead is not None and self._ahead.error is None

    @property
    def bytes_ahead(self) -> int:
        """What that load has brought in so far."""
        return 0 if self._ahead is None else self._ahead.bytes_done

    def load_ahead(self, prefetcher: ak.Prefetcher) -> None:
        """Map, and begin to load before the bytes are needed; `start_load` goes on with it.

        On failure nothing is mapped and nothing loads.
        """
        self.map()
        try:
            self._ahead = prefetcher.load(self.image, self.region, priority=AHEAD_PRIORITY)
        except BaseException:
            self.unmap()
            raise

    def start_load(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.error is not None:
            return prefetcher.load(self.image, self.region, priority=SWITCH_PRIORITY)
        ahead.set_priority(SWITCH_PRIORITY)
        return ahead

    def unmap(self) -> None:
        self._cancel_ahead()
        super().unmap()

    def close(self) -> None:
        self._cancel_ahead()
        super().close()

    def _cancel_ahead(self) -> None:
        if self._ahead is None:
            return
        ahead, self._ahead = self._ahead, None
        ahead.cancel()
        # Only its end matters: the memory is about to change hands.
        with suppress(ak.Error):
            ahead.wait()


@dataclass(frozen=True)
class DroppedKV:
    """What an engine has given up: blocks, and requests whose KV it will compute again."""

    num_blocks: int
    num_requests: int


class BlockBook(Protocol):
    """What a KV unit asks of the engine whose cache it holds; only between two steps."""

    def live(self) -> Sequence[int]:
        """Ids of the blocks that a request or the prefix cache still needs."""

    def drop(self) -> DroppedKV:
        """Give up all live blocks: their requests start over, the prefix cache forgets them."""

    def immovable(self) -> Sequence[int]:
        """Ids of blocks that keep their place, live or not."""

    def renumber(self, moves: Moves) -> None:
        """Block `moves.src_ids[i]` is now `moves.dst_ids[i]`, which was not live, and the other way
        round; its bytes have moved. Its users and what is known of it go along.
        """


class NoBlocks:
    """The book of a cache that no engine uses yet."""

    def live(self) -> Sequence[int]:
        return ()

    def drop(self) -> DroppedKV:
        return DroppedKV(0, 0)

    def immovable(self) -> Sequence[int]:
        return ()

    def renumber(self, moves: Moves) -> None:
        assert not len(moves.src_ids), "there is no block to move"


class KVUnit(Unit):
    """KV cache of one model; only live blocks are ever copied, and only those that have changed.

    layouts: where blocks lie; caches that share the range and the block ids.
    book: which blocks are live. Bytes of other blocks are lost on eviction, which is why new blocks
    are zeroed by the engine before they are used.

    A block's copy in the store stays when the block is back on the device, and is good until the
    engine writes to the block again: `written` must be told of every write.

    Shrunk, the unit holds its live blocks on the device and nothing behind them: they have been
    moved to the front. Mapping it brings the rest back.
    """

    tag = "kv"

    def __init__(self, region: ak.Region, store: HostKVStore) -> None:
        super().__init__(region)
        self.book: BlockBook = NoBlocks()
        self._layouts: Sequence[KVLayout] = ()
        self._shape = BlockShape(())
        self._store = store
        self._copies: dict[int, int] = {}  # block id: slot with its bytes as of the last save
        self._written: set[int] = set()  # blocks whose copy, if there is one, is out of date
        self._saving: dict[int, int] = {}
        self._loading: list[int] = []  # slots
        self._movable = True  # until moving has failed; tried again when it has been evicted
        # Of transfers that failed: whether the driver still works on them, nobody knows.
        self._in_doubt: list[int] = []

    @property
    def layouts(self) -> Sequence[KVLayout]:
        return self._layouts

    @layouts.setter
    def layouts(self, layouts: Sequence[KVLayout]) -> None:
        self._layouts = layouts
        self._shape = BlockShape.of(layouts)

    @property
    def slot_bytes(self) -> int:
        """Host memory that one block takes."""
        return self._shape.slot_bytes

    @property
    def copies(self) -> dict[int, int]:
        """Block id to slot of every block that has a copy; out of date or not."""
        return dict(self._copies)

    @property
    def num_copies(self) -> int:
        return len(self._copies)

    def written(self, block_ids: Iterable[int]) -> None:
        """The engine writes to these blocks, or has just written to them."""
        self._written.update(block_ids)

    def move_cost_bytes(self) -> int:
        live = self.book.live()
        return (len(live) + len(self._unsaved(live))) * self.slot_bytes

    def num_new_slots(self) -> int:
        """Slots that the store must still have for all live blocks to be saved."""
        if not self.holds_bytes:
            return 0
        live = self.book.live()
        self._forget_dead(live)
        return sum(block not in self._copies for block in live)

    def release_copies(self) -> None:
        """Give the host memory of the copies back; the blocks are on the device, or lost."""
        self._store.release(self._copies.values())
        self._copies.clear()

    def drop(self) -> DroppedKV:
        """Have the engine give up its blocks; none is copied, and none needs a place any more."""
        dropped = self.book.drop()
        self.release_copies()
        return dropped

    def disown(self) -> None:
        """Its engine has failed: nothing of it is needed any more."""
        self.book = NoBlocks()
        self.release_copies()

    def shrunk_bytes(self) -> int:
        """What it would hold on the device after `compact` and `give_back`; mapped_bytes when there
        is nothing to be won.
        """
        # A copy that may still be under way takes no notice of blocks that move.
        if not self.resident or self._in_doubt or not self._layouts or not self._movable:
            return self.mapped_bytes
        num_needed = self._num_needed()
        if num_needed == 0:
            return self.mapped_bytes  # evicting it costs no more
        return self.mapped_bytes - sum(size for _, size in self._unused(num_needed))

    def compact(self) -> int:
        """Move the live blocks to the front; returns how many have moved.

        Only between two steps, and only when resident. On a GPU the moves are ordered on the
        current stream and may not be over when it returns. Nothing is given back yet.

        Raises CannotMove, after which it does not offer to shrink until it has been evicted, and
        what the arena raises.
        """
        live = self.book.live()
        moves = ak.kv.plan_compaction(live, pinned_block_ids=self.book.immovable())
        self.move(moves)
        return len(moves.src_ids)

    def move(self, moves: Moves) -> None:
        """Move live blocks to blocks that are not live: bytes, book, and what the host has."""
        if not len(moves.src_ids):
            return
        self._forget_dead(self.book.live())
        try:
            ak.kv.move(self.region, moves.src_ids, moves.dst_ids, self._layouts)
        except ak.Error:
            raise
        except Exception as error:
            # Of torch and Triton, which have no common root. What has been moved is in blocks that
            # nobody uses: nothing has happened.
            self._movable = False
            raise CannotMove(f"blocks of {self.region.owner!r} cannot be moved: {error}") from error
        self.book.renumber(moves)
        renamed = dict(zip(moves.src_ids.tolist(), moves.dst_ids.tolist(), strict=True))
        overwritten = set(renamed.values())
        self._copies = {renamed.get(block, block): slot for block, slot in self._copies.items()}
        self._written = {
            renamed.get(block, block) for block in self._written if block not in overwritten
        }

    def give_back(self) -> None:
        """Unmap what lies behind the live blocks, which have been compacted; all of it or none.

        What was being moved has to be over.
        """
        with self.region.arena.transaction() as transaction:
            for offset, size in self._unused(self._num_needed()):
                transaction.unmap(self.region, offset, size)

    def undo_map(self) -> None:
        """After a `map` that led to nothing: what was on the device before stays there."""
        if not self.holds_bytes:
            super().undo_map()
            return
        # Not what no live block needs: since it shrank, requests may have ended whose blocks lay
        # before those of others.
        added, self._added = self._added, []
        if added:
            with self.region.arena.transaction() as transaction:
                for offset, size in added:
                    transaction.unmap(self.region, offset, size)

    def _num_needed(self) -> int:
        """One more than the highest id after `compact`; 0 when no block is live."""
        live = self.book.live()
        immovable = self.book.immovable()
        if not live:
            return 0
        return max(len({*live, *immovable}), *(block + 1 for block in immovable), 1)

    def _unused(self, num_blocks: int) -> list[ByteRange]:
        return unused_ranges(
            self._layouts,
            num_blocks,
            size_bytes=self.size_bytes,
            alignment_bytes=self.region.arena.handle_bytes,
        )

    def start_save(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        if not self.holds_bytes:
            return None
        live = self.book.live()
        self._forget_dead(live)
        blocks = self._unsaved(live)
        if not blocks:
            return None
        known = [block for block in blocks if block in self._copies]
        new = [block for block in blocks if block not in self._copies]
        slots = self._store.allocate(self.slot_bytes, len(new))
        # Overwritten in place: until that has succeeded they are no copies.
        self._saving = {block: self._copies.pop(block) for block in known}
        self._saving |= zip(new, slots, strict=True)
        pieces = self._shape.pieces(list(self._saving), list(self._saving.values()))
        return prefetcher.store(self.region, self._store.image, order=pieces)

    def finish_save(self) -> None:
        self._copies |= self._saving
        self._written -= self._saving.keys()
        self._saving = {}

    def give_up_save(self) -> None:
        self._in_doubt += self._saving.values()
        self._saving = {}

    def unmap(self) -> None:
        super().unmap()
        self._movable = True
        # Possible only when no transfer touches the region any more.
        self._store.release(self._in_doubt)
        self._in_doubt = []

    def start_load(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        if self.holds_bytes:
            return None
        # Requests may have ended since the save.
        live = self.book.live()
        self._forget_dead(live)
        lost = [block for block in live if block not in self._copies]
        assert not lost, f"blocks {lost} of {self.region.owner} are neither here nor on the host"
        if not live:
            return None
        self._loading = [self._copies[block] for block in live]
        self._store.hold(self._loading)
        pieces = self._shape.pieces(live, self._loading)
        return prefetcher.load(self._store.image, self.region, order=pieces)

    def finish_load(self) -> None:
        super().finish_load()
        self._store.release(self._loading)
        self._loading = []

    def give_up_load(self) -> None:
        # Without a load of its own its bytes are what they were.
        self._in_doubt += self._loading
        self._loading = []

    def close(self) -> None:
        super().close()
        self.disown()
        self._store.release(self._in_doubt)
        self._in_doubt = []

    def _unsaved(self, live: Sequence[int]) -> list[int]:
        if not self.holds_bytes:
            return []
        return [block for block in live if block not in self._copies or block in self._written]

    def _forget_dead(self, live: Sequence[int]) -> None:
        """Give up the copies of blocks that nobody needs any more."""
        dead = self._copies.keys() - set(live)
        self._store.release(self._copies.pop(block) for block in dead)


@dataclass
class ModelMemory:
    """What one model keeps in the arena, and since when it has not been used."""

    name: str
    pinned: bool = False
    units: list[Unit] = field(default_factory=list)
    last_used: float = 0.0
    moving: ModelState | None = None
    failed: bool = False

    @property
    def state(self) -> ModelState:
        if self.failed:
            return ModelState.FAILED
        if self.moving is not None:
            return self.moving
        if not self.units:
            return ModelState.COLD
        if all(unit.resident for unit in self.units):
            return ModelState.RESIDENT
        if any(isinstance(unit, WeightsUnit) and unit.loading_ahead for unit in self.units):
            return ModelState.LOADING
        return ModelState.HOST
