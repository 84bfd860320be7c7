"""What an operator may order: load, unload, pin, unpin. Done between two steps, or refused."""

from collections.abc import Callable, Mapping

from aegaeon.core.config import format_bytes
from aegaeon.core.errors import CapacityError, OrderRefused, UnknownModel
from aegaeon.switching.residency import ModelMemory, ModelState
from aegaeon.switching.switcher import Switcher


def carry_out(switcher: Switcher, order: str, name: str) -> ModelMemory:
    """Do what `order` (one of ORDERS) says with the model `name`; what it keeps where, afterwards.

    To load, or to unload, what is so already is no error. Raises UnknownModel, OrderRefused with
    the reason, and SwitchFailed as a switch does.
    """
    memory = switcher.models.get(name)
    if memory is None:
        raise UnknownModel(
            f"the model {name!r} does not exist; this server has: {', '.join(switcher.models)}"
        )
    if memory.state is ModelState.FAILED:
        raise OrderRefused(f"the model {name!r} is out of service")
    ORDERS[order](switcher, memory)
    return memory


def _load(switcher: Switcher, memory: ModelMemory) -> None:
    if memory.state is ModelState.RESIDENT:
        return
    try:
        switcher.activate(memory.name)
    except CapacityError as error:
        raise OrderRefused(str(error)) from error


def _unload(switcher: Switcher, memory: ModelMemory) -> None:
    if memory.pinned:
        raise OrderRefused(f"the model {memory.name!r} is pinned: unpin it first")
    if switcher.is_busy(memory.name):
        raise OrderRefused(
            f"the model {memory.name!r} has open requests, which would bring it back at once"
        )
    switcher.evict(memory.name)


def _pin(switcher: Switcher, memory: ModelMemory) -> None:
    models = switcher.models.values()
    pinned = sum(_size(other) for other in models if other.pinned or other is memory)
    capacity = switcher.arena.stats().capacity_bytes
    for other in models:
        needed = 0 if other.pinned or other is memory or not other.units else _size(other)
        if pinned + needed > capacity:
            raise OrderRefused(
                f"with {memory.name!r} pinned, pinned models would hold {format_bytes(pinned)} of "
                f"{format_bytes(capacity)} device memory, and {other.name!r} needs "
                f"{format_bytes(needed or _size(other))}"
            )
    _load(switcher, memory)
    memory.pinned = True


def _unpin(switcher: Switcher, memory: ModelMemory) -> None:
    memory.pinned = False


def _size(memory: ModelMemory) -> int:
    return sum(unit.size_bytes for unit in memory.units)


ORDERS: Mapping[str, Callable[[Switcher, ModelMemory], None]] = {
    "load": _load,
    "unload": _unload,
    "pin": _pin,
    "unpin": _unpin,
}
