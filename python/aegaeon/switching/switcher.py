"""Executes plans: makes one model resident, evicting others, or leaves everything as it was.

Not thread-safe: it belongs to the thread that steps the engines, and is called only between two
steps, when no batch is in flight. Snapshots for metrics may be taken from any thread.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import aegaeon_kernels as ak
from aegaeon.core.clock import Clock
from aegaeon.core.config import format_bytes
from aegaeon.core.errors import AegaeonError, CapacityError, OrderRefused
from aegaeon.switching.kv_store import HostKVStore
from aegaeon.switching.plan import ActivationPlan, UnitView, plan_activation
from aegaeon.switching.residency import (
    CannotMove,
    DroppedKV,
    KVUnit,
    ModelMemory,
    ModelState,
    Unit,
    WeightsUnit,
)

logger = logging.getLogger(__name__)

# For quantiles of the recent past; the totals are kept apart.
RECORDS_KEPT = 1_000


class SwitchFailed(AegaeonError):
    """A switch could not be done; nothing is lost. The step loop answers with a later retry."""


@dataclass(frozen=True, slots=True)
class SwitchRecord:
    """One activation. Times in seconds; `path` is hot (all was resident) or warm (host image).

    bytes_ahead: of bytes_in, what a prefetch had brought in when the switch began.
    dropped_blocks, recomputed_requests: KV that the host had no room for; see `Switcher`.
    shrunk: models whose KV cache gave back what no live block needs; compacted_blocks: how many
    blocks had to move on the device for that.
    """

    model: str
    path: str
    at: float
    seconds: float
    save_s: float = 0.0
    unmap_s: float = 0.0
    map_s: float = 0.0
    load_s: float = 0.0
    bytes_in: int = 0
    bytes_ahead: int = 0
    bytes_out: int = 0
    evicted: tuple[str, ...] = ()
    dropped_blocks: int = 0
    recomputed_requests: int = 0
    shrunk: tuple[str, ...] = ()
    compacted_blocks: int = 0


@dataclass
class SwitchTotals:
    """Running sums since start; monotone."""

    hot: int = 0
    warm: int = 0
    failed: int = 0
    prefetches: int = 0
    bytes_in: int = 0
    bytes_ahead: int = 0
    bytes_out: int = 0
    dropped_blocks: int = 0
    recomputed_requests: int = 0
    compacted_blocks: int = 0


@dataclass
class _Phases:
    save: float = 0.0
    unmap: float = 0.0
    map: float = 0.0
    load: float = 0.0


@dataclass
class Switcher:
    """Owns who is on the device.

    arena: where the units of all models live; its capacity is the device memory of the pool.
    prefetcher: copies between host memory and the arena.
    kv_store: holds the KV blocks of models that are not resident. When it has no room for those of
    a victim, another victim is chosen; as a last resort a model's KV is dropped and computed again:
    the record of the switch, the totals and a warning say so.
    host_memory_bytes: what weights images and the store may take together; None: no limit.
    on_activate: called with (previous or None, next) after each change of the current model, for
    per-model process state (random generators, workspaces).
    quiesce: called before memory changes hands; returns when the device is done with it.
    on_switch: called with the record of each switch.
    on_remove: called with the name of a model that has been removed.
    is_busy: whether a model has open requests; idle ones are evicted first.
    """

    arena: ak.Arena
    prefetcher: ak.Prefetcher
    kv_store: HostKVStore
    clock: Clock
    host_memory_bytes: int | None = None
    on_activate: Callable[[str | None, str], None] = lambda previous, current: None
    quiesce: Callable[[], None] = lambda: None
    on_switch: Callable[[SwitchRecord], None] = lambda record: None
    on_remove: Callable[[str], None] = lambda name: None
    is_busy: Callable[[str], bool] = lambda name: False
    current: str | None = None
    totals: SwitchTotals = field(default_factory=SwitchTotals)
    records: deque[SwitchRecord] = field(default_factory=lambda: deque(maxlen=RECORDS_KEPT))

    def __post_init__(self) -> None:
        self._models: dict[str, ModelMemory] = {}

    # -- what there is ---------------------------------------------------------------------

    def add_model(self, name: str, *, pinned: bool = False) -> ModelMemory:
        """Make `name` known; it has no units yet."""
        if name in self._models:
            raise ValueError(f"model {name!r} is already here")
        memory = ModelMemory(name=name, pinned=pinned)
        self._models[name] = memory
        return memory

    def add_weights(self, name: str, image: ak.HostImage) -> WeightsUnit:
        """Reserve the device range of `name`'s weights; `image` holds them in device layout.

        The unit is not resident before the next `activate(name)`. Takes `image` over.
        Raises CapacityError when the pool's host memory is too small for it.
        """
        self._admit_to_host(name, image.size_bytes)
        region = self._reserve(name, image.size_bytes, WeightsUnit.tag)
        unit = WeightsUnit(region, image)
        self._models[name].units.append(unit)
        return unit

    def add_kv(self, name: str, size_bytes: int) -> KVUnit:
        """Reserve the device range of `name`'s KV cache; on the host its blocks share the store."""
        unit = KVUnit(self._reserve(name, size_bytes, KVUnit.tag), self.kv_store)
        self._models[name].units.append(unit)
        return unit

    def _admit_to_host(self, name: str, size_bytes: int) -> None:
        if self.host_memory_bytes is None:
            return
        held = self.kv_store.image.size_bytes + sum(
            unit.image.size_bytes
            for memory in self._models.values()
            for unit in memory.units
            if isinstance(unit, WeightsUnit)
        )
        if held + size_bytes > self.host_memory_bytes:
            raise CapacityError(
                f"the host image of {name!r} needs {format_bytes(size_bytes)}, host_memory is "
                f"{format_bytes(self.host_memory_bytes)}, of which {format_bytes(held)} are taken, "
                f"{format_bytes(self.kv_store.image.size_bytes)} by host_kv_memory: raise "
                f"host_memory, lower host_kv_memory or serve fewer models",
                needed_bytes=size_bytes,
                available_bytes=self.host_memory_bytes - held,
            )

    def _reserve(self, name: str, size_bytes: int, tag: str) -> ak.Region:
        granularity = self.arena.device.granularity_bytes
        size_bytes = -(-size_bytes // granularity) * granularity
        return self.arena.reserve(size_bytes, owner=name, tag=tag)

    def remove_model(self, name: str) -> None:
        """Forget `name` and give back all it had, address ranges and host memory included.

        When `quiesce` raises, which is passed on, nothing has changed.
        """
        memory = self._models[name]
        self._quiesce_for(memory)
        for unit in list(memory.units):
            unit.close()
            memory.units.remove(unit)
        del self._models[name]
        if self.current == name:
            self.current = None
        self.on_remove(name)

    def abandon(self, name: str) -> None:
        """Take the device memory of a model that will never run again; its KV is not saved.

        What cannot be taken, because the device may still use it or a driver call failed, stays
        evictable, at no cost: the next switch that needs the room tries again.
        """
        memory = self._models[name]
        memory.failed = True
        memory.pinned = False
        for unit in memory.units:
            if isinstance(unit, KVUnit):
                unit.disown()
        try:
            self._quiesce_for(memory)
        except Exception as error:  # torch's; that is why the model failed, perhaps
            logger.warning(f"the memory of {name!r} stays in use: {error}")
            return
        for unit in memory.units:
            try:
                unit.unmap()
            except ak.Error as error:
                logger.warning(f"cannot unmap {unit.tag} of {name!r}: {error}")

    def _quiesce_for(self, memory: ModelMemory) -> None:
        """Before memory of that model changes hands, if it has any."""
        if any(unit.mapped_bytes for unit in memory.units):
            self.quiesce()

    @property
    def models(self) -> dict[str, ModelMemory]:
        return dict(self._models)

    def is_resident(self, name: str) -> bool:
        return self._models[name].state is ModelState.RESIDENT

    def missing_bytes(self, name: str) -> int:
        """What `activate` would copy in now: weights, and the KV blocks that the host keeps."""
        units = [unit for unit in self._models[name].units if not unit.holds_bytes]
        kv = sum(u.num_copies * u.slot_bytes for u in units if isinstance(u, KVUnit))
        return kv + sum(u.size_bytes - u.bytes_ahead for u in units if isinstance(u, WeightsUnit))

    def weights_bytes(self, name: str) -> int:
        units = self._models[name].units
        return sum(unit.size_bytes for unit in units if isinstance(unit, WeightsUnit))

    def close(self) -> None:
        for name in list(self._models):
            self.remove_model(name)
        self.prefetcher.close()
        self.arena.close()

    # -- switching -------------------------------------------------------------------------

    def activate(self, name: str, evict_first: Sequence[str] = ()) -> None:
        """Make all of `name` resident and current.

        evict_first: of units that cost the same to bring back, those of these models go first, in
        this order.

        Raises OrderRefused for a model that is out of service and CapacityError when it can never
        fit (nothing was touched), SwitchFailed when a driver call or a copy failed: then the
        previous state is restored as far as the device allows, and what could not be restored is
        on the host, complete.
        """
        started = self.clock.now()
        memory = self._models[name]
        if memory.failed:
            raise OrderRefused(f"the model {name!r} is out of service")
        if memory.state is ModelState.RESIDENT:
            if self.current != name:
                self.totals.hot += 1
                self.make_current(name)
                self._record(SwitchRecord(name, "hot", started, self.clock.now() - started))
            memory.last_used = started
            return
        units = [(model, unit) for model in self._models.values() for unit in model.units]
        plan = self._plan(units, name, evict_first)
        victims = [units[index][1] for index in plan.evict]
        incoming = [units[index][1] for index in plan.bring_in]
        evicted_models = {units[index][0].name for index in plan.evict}
        to_shrink = [units[index][1] for index in plan.shrink]
        shrunk_models = {units[index][0].name for index in plan.shrink}
        phases = _Phases()
        dropped = self._make_room_on_host(units, plan)
        bytes_out = bytes_in = num_compacted = 0
        bytes_ahead = sum(u.bytes_ahead for u in incoming if isinstance(u, WeightsUnit))
        self._mark(evicted_models, ModelState.EVICTING)
        self._mark({name}, ModelState.LOADING)
        evicted: list[Unit] = []
        try:
            self.quiesce()
            with self._phase(phases, "save"):
                bytes_out = self._save(victims)
            with self._phase(phases, "unmap"):
                num_compacted = self._compact(to_shrink)
                for unit in to_shrink:
                    assert isinstance(unit, KVUnit)
                    evicted.append(unit)
                    unit.give_back()
                for unit in victims:
                    evicted.append(unit)
                    unit.unmap()
            with self._phase(phases, "map"):
                for unit in incoming:
                    unit.map()
            with self._phase(phases, "load"):
                bytes_in = self._load(incoming)
        except CannotMove as error:
            # Nothing has been unmapped yet, and that cache does not offer to shrink any more.
            self.totals.bytes_out += bytes_out
            logger.warning(f"{error}; its cache is evicted where it would have been shrunk")
            self.activate(name, evict_first)
            return
        except ak.Error as error:
            self.totals.failed += 1
            self._undo(incoming, evicted)
            raise SwitchFailed(f"could not bring in {name!r}: {error}") from error
        finally:
            self._mark(evicted_models | {name}, None)
        memory.last_used = started
        self.make_current(name)
        self.totals.warm += 1
        self.totals.bytes_in += bytes_in
        self.totals.bytes_ahead += bytes_ahead
        self.totals.bytes_out += bytes_out
        self._record(
            SwitchRecord(
                model=name,
                path="warm",
                at=started,
                seconds=self.clock.now() - started,
                save_s=phases.save,
                unmap_s=phases.unmap,
                map_s=phases.map,
                load_s=phases.load,
                bytes_in=bytes_in,
                bytes_ahead=bytes_ahead,
                bytes_out=bytes_out,
                evicted=tuple(sorted(evicted_models)),
                dropped_blocks=dropped.num_blocks,
                recomputed_requests=dropped.num_requests,
                shrunk=tuple(sorted(shrunk_models)),
                compacted_blocks=num_compacted,
            )
        )

    def evict(self, name: str) -> None:
        """Take all of `name` off the device; its KV goes to the host, or when that has no room is
        dropped. Raises SwitchFailed when a driver call or a copy failed; all is then as before, as
        far as the device allows.
        """
        units = [(self._models[name], unit) for unit in self._models[name].units]
        drop = tuple(
            index
            for index, (_, unit) in enumerate(units)
            if isinstance(unit, KVUnit)
            and not self.kv_store.fits([(unit.slot_bytes, unit.num_new_slots())], [])
        )
        self._make_room_on_host(units, ActivationPlan(evict=(), bring_in=(), drop=drop))
        victims = [unit for _, unit in units]
        evicted: list[Unit] = []
        self._mark({name}, ModelState.EVICTING)
        try:
            self.quiesce()
            self.totals.bytes_out += self._save(victims)
            for unit in victims:
                evicted.append(unit)
                unit.unmap()
        except ak.Error as error:
            self._undo((), evicted)
            raise SwitchFailed(f"could not evict {name!r}: {error}") from error
        finally:
            self._mark({name}, None)

    def let_go(self, name: str) -> None:
        """As `evict`; a pinned model stays."""
        if not self._models[name].pinned:
            self.evict(name)

    def prefetch(self, name: str) -> bool:
        """Begin to bring in the weights of `name` while the current model goes on.

        Takes free memory and the weights of others, which need no copy out; never those of the
        current model or of a pinned one, nor KV. The next `activate(name)` waits for what is
        missing. Whether they are under way or there already; False when there is no room for them,
        or the model is out of service.

        A failure is logged and changes nothing that counts: the switch then has more to bring in.
        """
        memory = self._models[name]
        unit = next((u for u in memory.units if isinstance(u, WeightsUnit)), None)
        if unit is None or memory.failed:
            return False
        if unit.resident or unit.loading_ahead:
            return True
        units = [
            (model, other)
            for model in self._models.values()
            for other in model.units
            if isinstance(other, WeightsUnit)
        ]
        stats = self.arena.stats()
        views = [
            self._view(model, other, other.move_cost_bytes(), kept=model.name == self.current)
            for model, other in units
        ]
        try:
            plan = plan_activation(
                views,
                target=name,
                free_bytes=stats.free_bytes,
                capacity_bytes=stats.capacity_bytes,
            )
        except CapacityError:
            return False
        try:
            if plan.evict:
                self.quiesce()
            for index in plan.evict:
                units[index][1].unmap()
            unit.load_ahead(self.prefetcher)
        except ak.Error as error:
            logger.warning(f"cannot bring in {name!r} ahead of its turn: {error}")
            return False
        self.totals.prefetches += 1
        return True

    def _view(
        self,
        model: ModelMemory,
        unit: Unit,
        move_cost_bytes: int,
        *,
        num_new_slots: int = 0,
        kept: bool = False,
        order: int = 0,
        shrunk_bytes: int | None = None,
    ) -> UnitView:
        return UnitView(
            model=model.name,
            tag=unit.tag,
            size_bytes=unit.size_bytes,
            mapped=unit.mapped_bytes > 0,
            resident=unit.resident,
            holds_bytes=unit.holds_bytes,
            move_cost_bytes=move_cost_bytes,
            busy=not model.failed and self.is_busy(model.name),
            last_used=model.last_used,
            pinned=model.pinned or kept,
            needs_host=num_new_slots > 0,
            holds_host=isinstance(unit, KVUnit) and unit.num_copies > 0,
            droppable=isinstance(unit, KVUnit),
            order=order,
            held_bytes=unit.mapped_bytes,
            shrunk_bytes=shrunk_bytes,
        )

    def _plan(
        self,
        units: Sequence[tuple[ModelMemory, Unit]],
        target: str,
        evict_first: Sequence[str] = (),
    ) -> ActivationPlan:
        stats = self.arena.stats()
        # Quarantined memory is tried again by the next map, which says so when it fails.
        free_bytes = stats.free_bytes + stats.quarantined_bytes
        missing = sum(u.size_bytes - u.mapped_bytes for m, u in units if m.name == target)
        fits = missing <= free_bytes  # then nobody is evicted, and costs need not be known
        demands = {
            index: (unit.slot_bytes, 0 if fits else unit.num_new_slots())
            for index, (_, unit) in enumerate(units)
            if isinstance(unit, KVUnit)
        }
        orders = {name: i - len(evict_first) for i, name in enumerate(evict_first)}
        views = [
            self._view(
                model,
                unit,
                0 if fits else unit.move_cost_bytes(),
                num_new_slots=demands[index][1] if index in demands else 0,
                order=orders.get(model.name, 0),
                shrunk_bytes=unit.shrunk_bytes() if index in demands and not fits else None,
            )
            for index, (model, unit) in enumerate(units)
        ]

        def host_fits(evicted: Sequence[int], taken: Sequence[int]) -> bool:
            return self.kv_store.fits(
                [demands[index] for index in evicted],
                [
                    slot
                    for index in taken
                    if isinstance(unit := units[index][1], KVUnit)
                    for slot in unit.copies.values()
                ],
            )

        return plan_activation(
            views,
            target=target,
            free_bytes=free_bytes,
            capacity_bytes=stats.capacity_bytes,
            host_fits=host_fits,
        )

    def _make_room_on_host(
        self, units: Sequence[tuple[ModelMemory, Unit]], plan: ActivationPlan
    ) -> DroppedKV:
        """Carry out `plan.drop` and `plan.release`; what has been dropped in all."""
        num_blocks = num_requests = 0
        for index in plan.drop:
            model, unit = units[index]
            assert isinstance(unit, KVUnit)
            dropped = unit.drop()
            num_blocks += dropped.num_blocks
            num_requests += dropped.num_requests
            logger.warning(
                f"the host KV store is full: {dropped.num_blocks} KV blocks of {model.name!r} are "
                f"dropped, {dropped.num_requests} requests are computed again; raise host_kv_memory"
            )
        for index in plan.release:
            unit = units[index][1]
            assert isinstance(unit, KVUnit)
            unit.release_copies()
        self.totals.dropped_blocks += num_blocks
        self.totals.recomputed_requests += num_requests
        return DroppedKV(num_blocks, num_requests)

    def _record(self, record: SwitchRecord) -> None:
        self.records.append(record)
        self.on_switch(record)

    def make_current(self, name: str) -> None:
        """Install the process-wide state of `name`, resident or not: its engine acts next."""
        if self.current != name:
            previous, self.current = self.current, name
            self.on_activate(previous, name)

    def _save(self, units: Sequence[Unit]) -> int:
        """Copy out what exists only on the device, of all `units` or of none; the bytes moved."""
        try:
            num_bytes = self._transfer([unit.start_save for unit in units])
        except BaseException:
            for unit in units:
                unit.give_up_save()
            raise
        for unit in units:
            unit.finish_save()
        return num_bytes

    def _compact(self, units: Sequence[Unit]) -> int:
        """Move the live blocks of KV units to their front; how many have moved, when all have."""
        num_moved = 0
        for unit in units:
            assert isinstance(unit, KVUnit)
            num_moved += unit.compact()
        if num_moved:
            self.quiesce()
        self.totals.compacted_blocks += num_moved
        return num_moved

    def _load(self, units: Sequence[Unit]) -> int:
        """Copy in `units` from the host, all or none; the bytes moved."""
        try:
            num_bytes = self._transfer([unit.start_load for unit in units])
        except BaseException:
            for unit in units:
                unit.give_up_load()
            raise
        for unit in units:
            unit.finish_load()
        return num_bytes

    def _transfer(self, starts: Sequence[Callable[[ak.Prefetcher], ak.Ticket | None]]) -> int:
        """Start all copies, wait for all; returns the bytes moved. On an error none is left."""
        tickets: list[ak.Ticket] = []
        try:
            for start in starts:
                ticket = start(self.prefetcher)
                if ticket is not None:
                    tickets.append(ticket)
            for ticket in tickets:
                ticket.wait()
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            for ticket in tickets:
                # The first error is the one to report; here only the end of the copies matters.
                with suppress(ak.Error):
                    ticket.wait()
            raise
        return sum(ticket.bytes_done for ticket in tickets)

    def _undo(self, incoming: Sequence[Unit], evicted: Sequence[Unit]) -> None:
        """Back to before: incoming out, evicted in again. What fails here stays on the host."""
        for unit in incoming:
            try:
                unit.undo_map()
            except ak.Error as error:
                # Messages are formatted here: a kept log record would keep the error's frames.
                # Its memory stays mapped without counting as resident: the next try reloads it.
                logger.warning(f"cannot unmap {unit.tag} while undoing a switch: {error}")
        for unit in evicted:
            if unit.resident:
                continue  # it was the one that failed, and has lost nothing
            try:
                unit.map()
                self._load([unit])
            except ak.Error as error:
                # Nothing is lost: the host has all of it, and its model loads when it is next run.
                logger.warning(f"{unit.tag} stays on the host after a failed switch: {error}")

    def _mark(self, names: set[str], state: ModelState | None) -> None:
        for name in names:
            self._models[name].moving = state

    @contextmanager
    def _phase(self, phases: _Phases, name: str) -> Iterator[None]:
        started = self.clock.now()
        yield
        setattr(phases, name, self.clock.now() - started)
