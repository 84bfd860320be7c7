"""What an instance tells of itself, as plain values: its scheduler, switcher and meters together.

Knows nothing of vLLM. Callable from any thread.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from aegaeon.core.clock import Clock
from aegaeon.sched.meter import Meter, attainment_of
from aegaeon.sched.step_loop import StepLoop
from aegaeon.sched.usage import ModelUsage
from aegaeon.switching.metrics import SwitchMetrics
from aegaeon.switching.snapshot import state_of
from aegaeon.switching.switcher import Switcher


def instance_state(
    switcher: Switcher,
    loop: StepLoop,
    metrics: SwitchMetrics,
    meters: Mapping[str, Meter],
    clock: Clock,
) -> dict[str, Any]:
    """A snapshot for the admin interface, of the models that have a meter: others are only coming,
    or going.
    """
    state = state_of(switcher, clock, loop.loads())
    usage = loop.usage.totals()
    known = {name: attainment_of(meter) for name, meter in list(meters.items())}
    state["models"] = [model for model in state["models"] if model["name"] in known]
    for model in state["models"]:
        model["slo"] = known[model["name"]]
        model["usage"] = asdict(usage.get(model["name"], ModelUsage()))
    state["switches"]["seconds"] = metrics.seconds()
    return {**state, "loop": asdict(loop.counters), "costs": _costs(loop)}


def _costs(loop: StepLoop) -> dict[str, Any]:
    """What the loop has learned, in seconds and bytes; a workload file takes such profiles."""
    costs = loop.costs
    return {
        "link_bytes_per_s": costs.link_bytes_per_s,
        "switch_s0": costs.switch_s0,
        "profiles": {name: asdict(profile) for name, profile in list(costs.profiles.items())},
    }


def timeline(loop: StepLoop, since: int = 0) -> dict[str, Any]:
    """Who had the device lately, from slice `since` on."""
    slices = loop.usage.slices(since)
    return {
        "slice_s": loop.usage.slice_s,
        "slices": [{"number": number, "models": shares} for number, shares in slices],
    }
