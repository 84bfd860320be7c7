"""The device memory of one simulated instance: who is resident, what a switch moves and takes.

Says and does what `switching.Switcher` does, through the same `plan_activation`: a weights and a KV
unit per model, victims by the same ranks, prefetched weights that count at the next switch. Copies
take bytes over bandwidth, out first and then in; during a switch nothing is prefetched. The host
has room for all weights and all KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from aegaeon.core.errors import CapacityError
from aegaeon.sim.hardware import Model
from aegaeon.switching.plan import UnitView, plan_activation

# Bytes of a transfer that are lost in the rounding of floats.
_NOTHING = 1.0


@dataclass(frozen=True, slots=True)
class Switch:
    """path: hot (all was resident), warm (from the host), or ahead: all weights had been brought in
    before. bytes_ahead: of those that moved in, what was there already.
    """

    path: str
    seconds: float
    bytes_in: float = 0.0
    bytes_out: float = 0.0


HOT = Switch("hot", 0.0)


class Held:
    """What one model keeps on the device and on the host.

    ahead: bytes of the weights that a prefetch has brought in; None without one.
    saved_tokens: of the tokens of its open requests, those whose KV the host has.
    """

    __slots__ = (
        "ahead",
        "kv_mapped",
        "last_used",
        "live_tokens",
        "model",
        "saved_tokens",
        "weights_mapped",
        "weights_resident",
    )

    def __init__(self, model: Model, live_tokens: Callable[[], int]) -> None:
        self.model = model
        self.live_tokens = live_tokens
        self.weights_mapped = False
        self.weights_resident = False
        self.kv_mapped = False
        self.ahead: float | None = None
        self.saved_tokens = 0
        self.last_used = 0.0

    @property
    def resident(self) -> bool:
        return self.weights_resident and self.kv_mapped

    @property
    def mapped_bytes(self) -> int:
        mapped = self.model.weights_bytes if self.weights_mapped else 0
        return mapped + (self.model.kv_memory_bytes if self.kv_mapped else 0)

    def unsaved_tokens(self) -> int:
        live = self.live_tokens()
        self.saved_tokens = min(self.saved_tokens, live)
        return live - self.saved_tokens if self.kv_mapped else 0


class DeviceMemory:
    """Raises CapacityError for a model that cannot fit, as soon as it is added.

    is_busy: whether a model has open requests.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        link_bytes_per_s: float,
        switch_s0: float = 0.0,
        prefetch: bool = True,
        is_busy: Callable[[str], bool],
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.free_bytes = capacity_bytes
        self._link = link_bytes_per_s
        self._switch_s0 = switch_s0
        self._prefetch = prefetch
        self._is_busy = is_busy
        self._held: dict[str, Held] = {}
        # Models with memory on the device, in the order in which they got it.
        self._here: dict[str, Held] = {}
        self._loading: list[Held] = []
        self._settled_s = 0.0
        self.current: str | None = None

    def add(self, model: Model, live_tokens: Callable[[], int]) -> Held:
        if model.device_bytes > self.capacity_bytes:
            raise CapacityError(
                f"model {model.name!r} needs {model.weights_bytes / 1e9:.1f} GB of weights + "
                f"{model.kv_memory_bytes / 1e9:.1f} GB of KV cache = "
                f"{model.device_bytes / 1e9:.1f} GB on {model.tp} GPU(s), which have "
                f"{self.capacity_bytes / 1e9:.1f} GB for it; give it more GPUs (tp), larger ones, "
                f"or less kv_memory",
                needed_bytes=model.device_bytes,
                available_bytes=self.capacity_bytes,
            )
        held = Held(model, live_tokens)
        self._held[model.name] = held
        return held

    @property
    def resident(self) -> Iterable[str]:
        """Models that hold device memory, be it in part."""
        return self._here.keys()

    @property
    def loading(self) -> Iterable[str]:
        """Models whose missing bytes shrink with time."""
        return (held.model.name for held in self._loading)

    def is_resident(self, name: str) -> bool:
        return self._held[name].resident

    def missing_bytes(self, name: str) -> int:
        """What a switch to it would copy in, as of the last `settle`."""
        held = self._held[name]
        missing = 0.0
        if not held.weights_resident:
            missing = held.model.weights_bytes - (held.ahead or 0.0)
        if not held.kv_mapped:
            missing += held.live_tokens() * held.model.kv_bytes_per_token
        return int(missing)

    def settle(self, now: float) -> None:
        """Account for what was prefetched until now."""
        seconds, self._settled_s = now - self._settled_s, max(now, self._settled_s)
        if seconds <= 0 or not self._loading:
            return
        budget = seconds * self._link
        while self._loading and budget > 0:
            held = self._loading[0]
            assert held.ahead is not None
            moved = min(budget, held.model.weights_bytes - held.ahead)
            held.ahead += moved
            budget -= moved
            if held.ahead < held.model.weights_bytes - _NOTHING:
                break
            held.ahead = float(held.model.weights_bytes)
            self._loading.pop(0)

    def activate(self, name: str, evict_first: Sequence[str], now: float) -> Switch | None:
        """Make `name` resident and current; the copies end at `now` + the switch's seconds.

        None when it is both already.
        """
        held = self._held[name]
        if held.resident:
            held.last_used = now
            if self.current == name:
                return None
            self.current = name
            return HOT
        self.settle(now)
        orders = {each: index - len(evict_first) for index, each in enumerate(evict_first)}
        bytes_out = 0.0
        for victim, tag in self._victims(held, orders):
            if tag == "kv":
                bytes_out += victim.unsaved_tokens() * victim.model.kv_bytes_per_token
                victim.saved_tokens = victim.live_tokens()
            self._unmap(victim, tag)
        bytes_in = 0.0
        ahead = held.ahead
        if not held.weights_resident:
            bytes_in += held.model.weights_bytes - (ahead or 0.0)
            self._map_weights(held)
            held.weights_resident, held.ahead = True, None
            if held in self._loading:
                self._loading.remove(held)
        if not held.kv_mapped:
            bytes_in += held.live_tokens() * held.model.kv_bytes_per_token
            held.kv_mapped = True
            self.free_bytes -= held.model.kv_memory_bytes
            held.saved_tokens = held.live_tokens()
        self._here[name] = held
        seconds = (bytes_in + bytes_out) / self._link
        if bytes_in > _NOTHING:
            seconds += self._switch_s0
        held.last_used = now
        self._settled_s = now + seconds
        self.current = name
        came_ahead = ahead is not None and ahead >= held.model.weights_bytes - _NOTHING
        return Switch("ahead" if came_ahead else "warm", seconds, bytes_in, bytes_out)

    def prefetch(self, name: str, now: float) -> bool:
        """Begin to bring in its weights; whether they are there, under way, or have room."""
        if not self._prefetch:
            return False
        held = self._held[name]
        if held.weights_resident or held.ahead is not None:
            return True
        self.settle(now)
        units = [
            self._weights_view(each, kept=each.model.name == self.current)
            for each in self._here.values()
            if each.weights_mapped
        ]
        owners = [each for each in self._here.values() if each.weights_mapped]
        try:
            plan = plan_activation(
                [*units, self._weights_view(held, kept=False)],
                target=name,
                free_bytes=self.free_bytes,
                capacity_bytes=self.capacity_bytes,
            )
        except CapacityError:
            return False
        for index in plan.evict:
            self._unmap(owners[index], "weights")
        self._map_weights(held)
        held.ahead = 0.0
        self._here[name] = held
        self._loading.append(held)
        return True

    def _victims(self, target: Held, orders: dict[str, int]) -> list[tuple[Held, str]]:
        missing = 0 if target.weights_mapped else target.model.weights_bytes
        missing += 0 if target.kv_mapped else target.model.kv_memory_bytes
        if missing <= self.free_bytes:
            return []
        units: list[UnitView] = []
        owners: list[tuple[Held, str]] = []
        for held in {**self._here, target.model.name: target}.values():
            order = orders.get(held.model.name, 0)
            if held.weights_mapped or held is target:
                units.append(self._weights_view(held, kept=False, order=order))
                owners.append((held, "weights"))
            if held.kv_mapped or held is target:
                units.append(self._kv_view(held, order))
                owners.append((held, "kv"))
        plan = plan_activation(
            units,
            target=target.model.name,
            free_bytes=self.free_bytes,
            capacity_bytes=self.capacity_bytes,
        )
        return [owners[index] for index in plan.evict]

    def _weights_view(self, held: Held, *, kept: bool, order: int = 0) -> UnitView:
        model = held.model
        return UnitView(
            model=model.name,
            tag="weights",
            size_bytes=model.weights_bytes,
            mapped=held.weights_mapped,
            resident=held.weights_resident,
            holds_bytes=held.weights_resident,
            move_cost_bytes=model.weights_bytes,
            last_used=held.last_used,
            pinned=kept,
            busy=self._is_busy(model.name),
            order=order,
        )

    def _kv_view(self, held: Held, order: int) -> UnitView:
        model = held.model
        moved = held.live_tokens() + held.unsaved_tokens()
        return UnitView(
            model=model.name,
            tag="kv",
            size_bytes=model.kv_memory_bytes,
            mapped=held.kv_mapped,
            resident=held.kv_mapped,
            holds_bytes=held.kv_mapped,
            move_cost_bytes=moved * model.kv_bytes_per_token,
            last_used=held.last_used,
            busy=self._is_busy(model.name),
            order=order,
        )

    def _map_weights(self, held: Held) -> None:
        if not held.weights_mapped:
            held.weights_mapped = True
            self.free_bytes -= held.model.weights_bytes

    def _unmap(self, held: Held, tag: str) -> None:
        if tag == "kv":
            held.kv_mapped = False
            self.free_bytes += held.model.kv_memory_bytes
        else:
            held.weights_mapped = held.weights_resident = False
            held.ahead = None
            self.free_bytes += held.model.weights_bytes
            if held in self._loading:
                self._loading.remove(held)
        if not held.mapped_bytes:
            del self._here[held.model.name]
