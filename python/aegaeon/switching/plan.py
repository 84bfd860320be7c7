"""Plans an activation: which units to evict so that one model fits. Pure: bytes in, plan out."""

from collections.abc import Sequence
from dataclasses import dataclass

from aegaeon.core.config import format_bytes
from aegaeon.core.errors import CapacityError


@dataclass(frozen=True)
class UnitView:
    """One evictable range of one model (`tag`: weights, kv), as the planner sees it.

    size_bytes: device memory it takes when mapped.
    move_cost_bytes: bytes to copy if it is evicted now and wanted again.
    last_used: when its model last ran, on any clock. busy: whether it has open requests.
    """

    model: str
    tag: str
    size_bytes: int
    mapped: bool
    resident: bool
    move_cost_bytes: int
    last_used: float
    pinned: bool = False
    busy: bool = False

    @property
    def eviction_rank(self) -> tuple[bool, float, float]:
        """Idle models first; then what is cheapest to bring back per byte it frees; then, of idle
        models the least recently used, of busy ones the most recently used: they take turns, and
        the one that had the last turn waits longest for its next.
        """
        cost = self.move_cost_bytes / max(1, self.size_bytes)
        return (self.busy, cost, -self.last_used if self.busy else self.last_used)


@dataclass(frozen=True)
class ActivationPlan:
    """Indices into the units given: evict first, then bring in. Both may be empty."""

    evict: tuple[int, ...]
    bring_in: tuple[int, ...]


def plan_activation(
    units: Sequence[UnitView], *, target: str, free_bytes: int, capacity_bytes: int
) -> ActivationPlan:
    """What to evict and what to bring in so that all units of `target` are resident.

    Never evicts a pinned model or the target, and nothing when the target fits beside what is
    there. Raises CapacityError, with the numbers, when it cannot fit at all.
    """
    bring_in = tuple(
        index for index, unit in enumerate(units) if unit.model == target and not unit.resident
    )
    missing_bytes = sum(units[index].size_bytes for index in bring_in if not units[index].mapped)
    candidates = sorted(
        (
            index
            for index, unit in enumerate(units)
            if unit.mapped and unit.model != target and not unit.pinned
        ),
        key=lambda index: units[index].eviction_rank,
    )
    evict: list[int] = []
    available = free_bytes
    for index in candidates:
        if available >= missing_bytes:
            break
        evict.append(index)
        available += units[index].size_bytes
    if available < missing_bytes:
        raise CapacityError(
            _does_not_fit(units, target, capacity_bytes),
            needed_bytes=missing_bytes,
            available_bytes=available,
        )
    # The last ones chosen may have made an early small one unnecessary.
    for index in list(evict):
        if available - units[index].size_bytes >= missing_bytes:
            evict.remove(index)
            available -= units[index].size_bytes
    return ActivationPlan(evict=tuple(evict), bring_in=bring_in)


def _does_not_fit(units: Sequence[UnitView], target: str, capacity_bytes: int) -> str:
    parts = " + ".join(
        f"{format_bytes(unit.size_bytes)} {unit.tag}" for unit in units if unit.model == target
    )
    total = sum(unit.size_bytes for unit in units if unit.model == target)
    pinned = sum(
        unit.size_bytes for unit in units if unit.pinned and unit.mapped and unit.model != target
    )
    held = f", of which pinned models hold {format_bytes(pinned)}" if pinned else ""
    return (
        f"model {target!r} needs {parts} = {format_bytes(total)}, device_memory is "
        f"{format_bytes(capacity_bytes)}{held}; raise device_memory, lower the model's kv_memory "
        f"or unpin a model"
    )
