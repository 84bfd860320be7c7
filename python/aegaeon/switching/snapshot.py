"""What the admin interface shows of a switcher, as plain values. Callable from any thread."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aegaeon.core.clock import Clock
from aegaeon.core.engine import EngineLoad
from aegaeon.switching.residency import ModelMemory, ModelState
from aegaeon.switching.switcher import Switcher


def state_of(switcher: Switcher, clock: Clock, loads: Mapping[str, EngineLoad]) -> dict[str, Any]:
    """Who is where, who holds the device memory, totals.

    loads: open requests by model; those that are out of service are missing.
    """
    stats = switcher.arena.stats()
    totals = switcher.totals
    models = switcher.models
    current = switcher.current
    on_device = current in models and models[current].state is ModelState.RESIDENT
    none = EngineLoad(0, 0)
    return {
        "now": clock.now(),
        "current": current if on_device else None,
        "models": [
            {
                **describe(memory),
                "running": loads.get(name, none).num_running,
                "waiting": loads.get(name, none).num_waiting,
            }
            for name, memory in models.items()
        ],
        "arena": {
            "capacity_bytes": stats.capacity_bytes,
            "free_bytes": stats.free_bytes,
            "held": [
                {"owner": owner, "tag": tag, "bytes": num_bytes}
                for (owner, tag), num_bytes in stats.owners.items()
            ],
        },
        "switches": {
            "hot": totals.hot,
            "warm": totals.warm,
            "failed": totals.failed,
            "bytes_in": totals.bytes_in,
            "bytes_out": totals.bytes_out,
            "dropped_blocks": totals.dropped_blocks,
            "recomputed_requests": totals.recomputed_requests,
        },
        "host_kv": asdict(switcher.kv_store.stats()),
    }


def describe(memory: ModelMemory) -> dict[str, Any]:
    """One model: its state and what it keeps on the device."""
    return {
        "name": memory.name,
        "state": memory.state.value,
        "pinned": memory.pinned,
        "units": [
            {"tag": unit.tag, "size_bytes": unit.size_bytes, "mapped_bytes": unit.mapped_bytes}
            for unit in memory.units
        ],
    }


def records_of(switcher: Switcher, since: float | None = None) -> list[dict[str, Any]]:
    """The last switches, oldest first; those that began after `since`, on the clock of `now`."""
    records = list(switcher.records)
    return [asdict(record) for record in records if since is None or record.at > since]
