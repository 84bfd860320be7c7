"""Plans an activation: which units to shrink or evict so that one model fits. Pure: bytes in, plan
out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from aegaeon.core.config import format_bytes
from aegaeon.core.errors import CapacityError


@dataclass(frozen=True)
class UnitView:
    """One evictable range of one model (`tag`: weights, kv), as the planner sees it.

    size_bytes: device memory it takes when mapped as a whole. held_bytes: what it takes now; None:
    all of that when it is mapped.
    shrunk_bytes: what is left of that when it gives back what it does not need; None: it cannot.
    resident: all of it is on the device. holds_bytes: what its model needs of it is there, if not
    all that the model needs to run (a shrunk cache).
    move_cost_bytes: bytes to copy if it is evicted now and wanted again.
    last_used: when its model last ran, on any clock. busy: whether it has open requests.
    needs_host: evicting it takes host memory that it does not have yet.
    holds_host: it holds host memory that may be taken from it: by keeping the bytes on the device
    only when it holds them there, else by losing them (KV: they are computed again).
    droppable: its bytes may be given up.
    order: where all else is equal, lower is evicted earlier, whenever its model was last used.
    """

    model: str
    tag: str
    size_bytes: int
    mapped: bool
    resident: bool
    holds_bytes: bool
    move_cost_bytes: int
    last_used: float
    pinned: bool = False
    busy: bool = False
    needs_host: bool = False
    holds_host: bool = False
    droppable: bool = False
    order: int = 0
    held_bytes: int | None = None
    shrunk_bytes: int | None = None

    @property
    def mapped_bytes(self) -> int:
        if self.held_bytes is None:
            return self.size_bytes if self.mapped else 0
        return self.held_bytes

    @property
    def spare_bytes(self) -> int:
        """What it can give back and stay."""
        return 0 if self.shrunk_bytes is None else self.mapped_bytes - self.shrunk_bytes

    @property
    def eviction_rank(self) -> tuple[bool, float, int, float]:
        """Idle models first; then what is cheapest to bring back per byte it frees; then by
        `order`; then, of idle models the least recently used, of busy ones the most recently used:
        they take turns, and the one that had the last turn waits longest for its next.
        """
        cost = self.move_cost_bytes / max(1, self.mapped_bytes)
        return (self.busy, cost, self.order, -self.last_used if self.busy else self.last_used)


@dataclass(frozen=True)
class ActivationPlan:
    """Indices into the units given. In this order: give up what `drop` holds, on the device or on
    the host, and the host copies of `release`; evict; shrink; bring in. All may be empty.
    """

    evict: tuple[int, ...]
    bring_in: tuple[int, ...]
    release: tuple[int, ...] = ()
    drop: tuple[int, ...] = ()
    shrink: tuple[int, ...] = ()


# (indices evicted, indices whose host memory is taken) -> whether the host has room for them.
HostFits = Callable[[Sequence[int], Sequence[int]], bool]


def plan_activation(
    units: Sequence[UnitView],
    *,
    target: str,
    free_bytes: int,
    capacity_bytes: int,
    host_fits: HostFits = lambda evicted, taken: True,
) -> ActivationPlan:
    """What to evict and what to bring in so that all units of `target` are resident.

    Never touches a pinned model or the target, and nothing when the target fits beside what is
    there. What units can give back and stay is taken before any is evicted. When the host has no
    room for a victim another one is chosen; when that does not help, host copies of what is on the
    device as well are released; as a last resort units are dropped, those of idle models first.
    Raises CapacityError, with the numbers, when it cannot fit at all.
    """
    bring_in = tuple(
        index for index, unit in enumerate(units) if unit.model == target and not unit.resident
    )
    missing_bytes = sum(units[index].size_bytes - units[index].mapped_bytes for index in bring_in)
    evictable = [
        index
        for index, unit in enumerate(units)
        if unit.mapped and unit.model != target and not unit.pinned
    ]
    reachable_bytes = free_bytes + sum(units[index].mapped_bytes for index in evictable)
    if reachable_bytes < missing_bytes:
        raise CapacityError(
            _does_not_fit(units, target, capacity_bytes),
            needed_bytes=missing_bytes,
            available_bytes=reachable_bytes,
        )
    release: list[int] = []
    drop: list[int] = []
    wanted_bytes = missing_bytes - free_bytes
    shrink = [index for index in evictable if units[index].spare_bytes > 0]
    all_units, all_wanted_bytes = units, wanted_bytes
    if wanted_bytes > 0 and shrink:
        # As if all had given back what they can; who need not have is found at the end.
        wanted_bytes -= sum(units[index].spare_bytes for index in shrink)
        units = [
            replace(unit, held_bytes=unit.shrunk_bytes) if index in shrink else unit
            for index, unit in enumerate(units)
        ]
    evict = _choose(units, evictable, wanted_bytes, release, drop, host_fits)
    for taken, index in _host_memory_to_take(units, target, release, drop):
        if evict is not None:
            break
        taken.append(index)
        evict = _choose(units, evictable, wanted_bytes, release, drop, host_fits)
    assert evict is not None, "a unit that is dropped needs no host memory"
    for index in list(drop):
        # One that was taken early may not have helped.
        fewer = [i for i in drop if i != index]
        without = _choose(units, evictable, wanted_bytes, release, fewer, host_fits)
        if without is not None:
            drop, evict = fewer, without
    return ActivationPlan(
        evict=tuple(evict),
        bring_in=bring_in,
        release=tuple(index for index in release if index not in evict),
        # What stays on the device has only lost its copies, which come before drops.
        drop=tuple(index for index in drop if index in evict or not units[index].holds_bytes),
        shrink=_needed(all_units, shrink, evict, all_wanted_bytes),
    )


def _needed(
    units: Sequence[UnitView], shrink: Sequence[int], evict: Sequence[int], wanted_bytes: int
) -> tuple[int, ...]:
    """Of `shrink`, what is needed beside `evict`; those that give back most are kept."""
    needed: list[int] = []
    wanted_bytes -= sum(units[index].mapped_bytes for index in evict)
    candidates = [index for index in shrink if index not in evict]
    for index in sorted(candidates, key=lambda index: -units[index].spare_bytes):
        if wanted_bytes <= 0:
            break
        needed.append(index)
        wanted_bytes -= units[index].spare_bytes
    return tuple(needed)


def _host_memory_to_take(
    units: Sequence[UnitView], target: str, release: list[int], drop: list[int]
) -> list[tuple[list[int], int]]:
    """(list to put it on, index), in the order of what it costs: copies of what is on the device,
    then units of idle models, then those of busy ones; the least recently used first.
    """
    copies = [index for index, unit in enumerate(units) if unit.holds_bytes and unit.holds_host]
    droppable = [
        index
        for index, unit in enumerate(units)
        if unit.droppable and unit.model != target and not unit.pinned
    ]
    copies.sort(key=lambda index: units[index].last_used)
    droppable.sort(key=lambda index: (units[index].busy, units[index].last_used))
    return [(release, index) for index in copies] + [(drop, index) for index in droppable]


def _choose(
    units: Sequence[UnitView],
    evictable: Sequence[int],
    wanted_bytes: int,
    release: Sequence[int],
    drop: Sequence[int],
    host_fits: HostFits,
) -> list[int] | None:
    """The cheapest victims that free `wanted_bytes`; None when the host has no room for them."""

    def rank(index: int) -> tuple[bool, float, int, float]:
        unit = units[index]
        return (replace(unit, move_cost_bytes=0) if index in drop else unit).eviction_rank

    evict: list[int] = []
    available = 0
    for index in sorted(evictable, key=rank):
        if available >= wanted_bytes:
            break
        if units[index].needs_host and index not in drop:
            saved = [i for i in (*evict, index) if units[i].needs_host and i not in drop]
            # A victim's own copies are what makes it cheap: not taken.
            taken = [*drop, *(i for i in release if i not in saved)]
            if not host_fits(saved, taken):
                continue
        evict.append(index)
        available += units[index].mapped_bytes
    if available < wanted_bytes:
        return None
    # The last ones chosen may have made an early small one unnecessary.
    for index in list(evict):
        if available - units[index].mapped_bytes >= wanted_bytes:
            evict.remove(index)
            available -= units[index].mapped_bytes
    return evict


def _does_not_fit(units: Sequence[UnitView], target: str, capacity_bytes: int) -> str:
    parts = " + ".join(
        f"{format_bytes(unit.size_bytes)} {unit.tag}" for unit in units if unit.model == target
    )
    total = sum(unit.size_bytes for unit in units if unit.model == target)
    pinned = sum(unit.mapped_bytes for unit in units if unit.pinned and unit.model != target)
    held = f", of which pinned models hold {format_bytes(pinned)}" if pinned else ""
    return (
        f"model {target!r} needs {parts} = {format_bytes(total)}, device_memory is "
        f"{format_bytes(capacity_bytes)}{held}; raise device_memory, lower the model's kv_memory "
        f"or unpin a model"
    )
