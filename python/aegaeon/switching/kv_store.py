"""Host memory for KV blocks that have left the device: one region, cut into slabs by block size.

A *slab* is a run of frames that holds blocks of one size, so that models of any shape share the
region without fragmenting it; an empty slab gives its frames back (the unified KV cache of Aegaeon,
SOSP '25, section 5.2). A *slot* is the place of one block, named by its offset in the region. Slots
are reference-counted: the owner of a copy holds one reference, every transfer under way another, so
a slot that is given up while its bytes still move is not handed out before they have arrived.

Not thread-safe: it belongs to the thread that switches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import aegaeon_kernels as ak
from aegaeon.core.config import format_bytes
from aegaeon.core.errors import CapacityError
from aegaeon_kernels.kv_layout import KVLayout

FRAME_BYTES = 2 << 20
# Of a slab, behind its last slot: a slab takes as many frames as keep its waste below this.
MAX_WASTED_SHARE = 1 / 16

# (region_offset_bytes, slot_offset_bytes, size_bytes), as `Prefetcher` takes them.
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class BlockShape:
    """The bytes of one block: runs in the region, which follow one another in a slot.

    runs: (offset_bytes of block 0, distance_bytes from block to block, size_bytes). A cache whose
    blocks are outermost has one; one with a plane per layer has as many as layers.
    """

    runs: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, layouts: Sequence[KVLayout]) -> "BlockShape":
        """The shape of caches that share one allocation and one set of block ids.

        Planes that touch or overlay each other become one run.
        """
        planes = sorted(
            (stride, offset, layout.block_bytes)
            for layout in layouts
            for offset, stride in layout.planes
        )
        runs: list[tuple[int, int, int]] = []
        for stride, offset, size in planes:
            if runs and runs[-1][1] == stride:
                first, _, length = runs[-1]
                end = max(first + length, offset + size)
                if offset <= first + length and end - first <= stride:
                    runs[-1] = (first, stride, end - first)
                    continue
            runs.append((offset, stride, size))
        return cls(tuple(runs))

    @property
    def slot_bytes(self) -> int:
        return sum(size for _, _, size in self.runs)

    def pieces(self, block_ids: Sequence[int], slots: Sequence[int]) -> list[Piece]:
        """What to copy so that block_ids[i] and slots[i] hold the same; long runs where both go on.

        Cost: O(runs * blocks), plus a sort of the ids.
        """
        pairs = sorted(zip(block_ids, slots, strict=True))
        pieces: list[Piece] = []
        in_slot = 0
        for offset, stride, size in self.runs:
            first, begin, length = 0, 0, 0
            for block, slot in pairs:
                in_region, in_image = offset + block * stride, slot + in_slot
                if length and first + length == in_region and begin + length == in_image:
                    length += size
                    continue
                if length:
                    pieces.append((first, begin, length))
                first, begin, length = in_region, in_image, size
            if length:
                pieces.append((first, begin, length))
            in_slot += size
        return pieces


@dataclass(frozen=True)
class StoreStats:
    """used_bytes: of slots with a reference. slab_bytes: of the frames that slabs hold."""

    capacity_bytes: int
    used_bytes: int
    slab_bytes: int


class _Slab:
    def __init__(self, start_bytes: int, num_frames: int, slot_bytes: int) -> None:
        self.start_bytes = start_bytes
        self.num_frames = num_frames
        self.num_slots = num_frames * FRAME_BYTES // slot_bytes
        # Lowest first: neighbours in a slab are copied as one run.
        self.free = list(range(self.num_slots))
        self.references = [0] * self.num_slots


class HostKVStore:
    """Slots for KV blocks in `image`, a writable host image that is used from front to end."""

    def __init__(self, image: ak.HostImage) -> None:
        self.image = image
        self._frames = bytearray(b"\1" * (image.size_bytes // FRAME_BYTES))  # 1: free
        self._slab_of_frame: dict[int, tuple[int, _Slab]] = {}  # frame: (slot bytes, slab)
        # By slot size: slabs with a free slot, by address.
        self._open: dict[int, dict[int, _Slab]] = {}
        self._used_bytes = 0

    def allocate(self, slot_bytes: int, count: int) -> list[int]:
        """Offsets of `count` slots, each with one reference, neighbours where that is possible.

        Raises CapacityError, with nothing taken, when they do not fit: see `fits`.
        """
        if not self.fits([(slot_bytes, count)]):
            raise CapacityError(
                f"{count} KV blocks of {format_bytes(slot_bytes)} do not fit in the host KV store: "
                f"it has {format_bytes(self.stats().capacity_bytes)}, of which "
                f"{format_bytes(self._used_bytes)} are in use",
                needed_bytes=slot_bytes * count,
                available_bytes=self.stats().capacity_bytes - self._used_bytes,
            )
        slots: list[int] = []
        open_slabs = self._open.setdefault(slot_bytes, {})
        for start in sorted(open_slabs):
            self._take(open_slabs[start], slot_bytes, count - len(slots), slots)
        while len(slots) < count:
            self._take(self._new_slab(slot_bytes), slot_bytes, count - len(slots), slots)
        return slots

    def hold(self, slots: Iterable[int]) -> None:
        """One more reference to each of `slots`, which have one already."""
        for slot in slots:
            _, slab, index = self._find(slot)
            slab.references[index] += 1

    def release(self, slots: Iterable[int]) -> None:
        """One reference less to each of `slots`; without any, a slot is free."""
        for slot in slots:
            slot_bytes, slab, index = self._find(slot)
            slab.references[index] -= 1
            if slab.references[index]:
                continue
            heappush(slab.free, index)
            self._used_bytes -= slot_bytes
            open_slabs = self._open[slot_bytes]
            if len(slab.free) < slab.num_slots:
                open_slabs[slab.start_bytes] = slab
                continue
            open_slabs.pop(slab.start_bytes, None)
            first = slab.start_bytes // FRAME_BYTES
            for frame in range(first, first + slab.num_frames):
                self._frames[frame] = 1
                del self._slab_of_frame[frame]

    def fits(self, demands: Iterable[tuple[int, int]], released: Iterable[int] = ()) -> bool:
        """Whether all demands (slot bytes, count) fit at once, if `released` were released."""
        wanted: dict[int, int] = {}
        for slot_bytes, count in demands:
            wanted[slot_bytes] = wanted.get(slot_bytes, 0) + count
        free = {
            size: sum(len(slab.free) for slab in self._open.get(size, {}).values())
            for size in wanted
        }
        frames = bytearray(self._frames)
        self._imagine_released(released, free, frames)
        for slot_bytes, count in wanted.items():
            num_frames = frames_per_slab(slot_bytes)
            per_slab = num_frames * FRAME_BYTES // slot_bytes
            for _ in range(-(-max(0, count - free[slot_bytes]) // per_slab)):
                first = frames.find(b"\1" * num_frames)
                if first < 0:
                    return False
                frames[first : first + num_frames] = bytes(num_frames)
        return True

    def _imagine_released(
        self, released: Iterable[int], free: dict[int, int], frames: bytearray
    ) -> None:
        by_slab: dict[int, int] = {}
        for slot in released:
            _, slab, index = self._find(slot)
            if slab.references[index] == 1:
                by_slab[slab.start_bytes] = by_slab.get(slab.start_bytes, 0) + 1
        for start, count in by_slab.items():
            slot_bytes, slab = self._slab_of_frame[start // FRAME_BYTES]
            if len(slab.free) + count == slab.num_slots:
                first = start // FRAME_BYTES
                frames[first : first + slab.num_frames] = b"\1" * slab.num_frames
                if slot_bytes in free:
                    free[slot_bytes] -= len(slab.free)
            elif slot_bytes in free:
                free[slot_bytes] += count

    def stats(self) -> StoreStats:
        return StoreStats(
            capacity_bytes=len(self._frames) * FRAME_BYTES,
            used_bytes=self._used_bytes,
            slab_bytes=self._frames.count(0) * FRAME_BYTES,
        )

    def _take(self, slab: _Slab, slot_bytes: int, at_most: int, slots: list[int]) -> None:
        for _ in range(min(at_most, len(slab.free))):
            index = heappop(slab.free)
            slab.references[index] = 1
            slots.append(slab.start_bytes + index * slot_bytes)
            self._used_bytes += slot_bytes
        if not slab.free:
            del self._open[slot_bytes][slab.start_bytes]

    def _new_slab(self, slot_bytes: int) -> _Slab:
        num_frames = frames_per_slab(slot_bytes)
        first = self._frames.find(b"\1" * num_frames)
        slab = _Slab(first * FRAME_BYTES, num_frames, slot_bytes)
        for frame in range(first, first + num_frames):
            self._frames[frame] = 0
            self._slab_of_frame[frame] = (slot_bytes, slab)
        self._open[slot_bytes][slab.start_bytes] = slab
        return slab

    def _find(self, slot: int) -> tuple[int, _Slab, int]:
        slot_bytes, slab = self._slab_of_frame[slot // FRAME_BYTES]
        return slot_bytes, slab, (slot - slab.start_bytes) // slot_bytes


def frames_per_slab(slot_bytes: int) -> int:
    """The fewest frames that hold at least one slot and waste at most MAX_WASTED_SHARE."""
    num_frames = -(-slot_bytes // FRAME_BYTES)
    while num_frames * FRAME_BYTES % slot_bytes > MAX_WASTED_SHARE * num_frames * FRAME_BYTES:
        num_frames += 1
    return num_frames
