"""The residency of one model: its states, and the two things it keeps on the device.

A model has a *weights* unit (immutable: evicting it is dropping it, the host image is the truth)
and a *KV* unit (mutable: evicting it copies the live blocks out first). Each unit has its own
stable virtual range; units come and go one by one, a model runs when both are resident.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aegaeon_kernels as ak
from aegaeon_kernels.kv_layout import ByteRange, KVLayout, merged_ranges


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


class Unit(ABC):
    """A device range and the host image behind it. `resident` only when the bytes are right."""

    tag: str

    def __init__(self, region: ak.Region, image: ak.HostImage) -> None:
        self.region = region
        self.image = image
        # Mapped memory whose bytes are not (yet) the model's does not count as resident.
        self._valid = False

    @property
    def size_bytes(self) -> int:
        return self.region.size_bytes

    @property
    def mapped_bytes(self) -> int:
        return self.region.mapped_bytes

    @property
    def resident(self) -> bool:
        return self._valid

    @abstractmethod
    def move_cost_bytes(self) -> int:
        """Bytes to copy if this unit is evicted now and wanted again."""

    def start_save(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        """Begin to copy out what exists only on the device; None when there is nothing."""
        return None

    def unmap(self) -> None:
        """Give the memory back; the address range stays. On failure nothing has changed."""
        if self.region.mapped_bytes:
            self.region.unmap()
        self._valid = False

    def map(self) -> None:
        if not self.region.mapped_bytes:
            # What is read is loaded or, of new KV blocks, zeroed by the engine before that.
            self.region.map(contents="preserve")

    @abstractmethod
    def start_load(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        """Begin to copy the host image in; None when there is nothing to copy."""

    def finish_load(self) -> None:
        """The copy has ended well: the bytes are the model's."""
        self._valid = True

    def close(self) -> None:
        """Give back memory and address range; the host image goes with this object."""
        self.region.close()
        self._valid = False


class WeightsUnit(Unit):
    tag = "weights"

    def move_cost_bytes(self) -> int:
        return self.image.size_bytes

    def start_load(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        return prefetcher.load(self.image, self.region)


class KVUnit(Unit):
    """KV cache of one model; only live blocks are ever copied.

    layouts: where blocks lie; caches that share the range and the block ids.
    live_blocks: ids that a request or the prefix cache still needs, asked when nothing is in
    flight. Bytes of other blocks are lost on eviction, which is why new blocks are zeroed by
    the engine before they are used.
    """

    tag = "kv"

    def __init__(self, region: ak.Region, image: ak.HostImage) -> None:
        super().__init__(region, image)
        self.layouts: Sequence[KVLayout] = ()
        self.live_blocks: Callable[[], Sequence[int]] = list
        self._saved: list[ByteRange] = []

    def close(self) -> None:
        super().close()
        self.live_blocks = list  # it refers to an engine, which refers to this unit

    def _live_ranges(self) -> list[ByteRange]:
        return merged_ranges(self.layouts, self.live_blocks())

    def move_cost_bytes(self) -> int:
        if not self.resident:
            return 2 * sum(size_bytes for _, size_bytes in self._saved)
        bytes_per_block = sum(layout.bytes_per_block for layout in self.layouts)
        return 2 * len(self.live_blocks()) * bytes_per_block

    def start_save(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        if not self.resident:
            return None
        self._saved = self._live_ranges()
        if not self._saved:
            return None
        return prefetcher.store(self.region, self.image, order=self._saved)

    def start_load(self, prefetcher: ak.Prefetcher) -> ak.Ticket | None:
        if not self._saved:
            return None
        return prefetcher.load(self.image, self.region, order=self._saved)


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
        return ModelState.HOST
