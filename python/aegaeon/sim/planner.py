"""The fewest GPUs that meet the objectives, by search over the simulator, and what limits them.

A pool is planned group by group (models of one `tp` share one), for one policy. What limits it is
asked of the simulator too: with one instance fewer, would a link without end, memory for all, or
twice the compute have been enough?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from aegaeon.core.errors import CapacityError
from aegaeon.sched.cost import Profile
from aegaeon.sim.hardware import GpuGroup, profile_of
from aegaeon.sim.study import Run, simulate
from aegaeon.sim.workload import Load, Scenario

# A pool that still misses its objectives with as many instances is given up.
MOST_INSTANCES = 4096


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """attained: with `instances`; with_one_fewer: with one less, 0 for none.

    limits: of memory, link and compute those that would each have let one instance fewer do.
    """

    group: GpuGroup
    num_models: int
    attained: float
    with_one_fewer: float
    limits: tuple[str, ...]

    @property
    def num_gpus(self) -> int:
        return self.group.num_gpus


@dataclass(frozen=True, slots=True)
class PoolPlan:
    policy: str
    groups: tuple[GroupPlan, ...]

    @property
    def num_gpus(self) -> int:
        return sum(plan.num_gpus for plan in self.groups)


def plan_pool(
    scenario: Scenario,
    policy: str,
    *,
    level: float = 0.9,
    metric: str = "tokens_on_time",
    seeds: Sequence[int] = (0,),
    on_try: Callable[[str, int], None] = lambda policy, instances: None,
) -> PoolPlan:
    """The fewest instances of each group, `policy` given, with `metric` of at least `level`.

    on_try: called before each simulation. Raises CapacityError when MOST_INSTANCES are too few.
    """
    plans = []
    for part in parts(scenario):

        def attained(instances: int, part: Scenario = part) -> float:
            on_try(policy, instances)
            return _attained(_sized(part, instances), policy, metric, seeds)

        found = _fewest(attained, level)
        if found is None:
            raise CapacityError(
                f"{policy}: {len(part.loads)} models miss their objectives with "
                f"{MOST_INSTANCES} instances too: the objectives are too strict for "
                f"{part.groups[0].gpu.name}, or the policy refuses requests",
                needed_bytes=0,
                available_bytes=0,
            )
        instances, reached, before = found
        plans.append(
            GroupPlan(
                _sized(part, instances).groups[0],
                len(part.loads),
                reached,
                before,
                _limits(part, policy, instances, level, metric, seeds),
            )
        )
    return PoolPlan(policy, tuple(plans))


def plan_dedicated(
    scenario: Scenario,
    *,
    level: float = 0.9,
    metric: str = "tokens_on_time",
    seeds: Sequence[int] = (0,),
) -> int:
    """GPUs when each model has its own, as many as it needs."""
    total = 0
    for part in parts(scenario):
        group = part.groups[0]
        for load in part.loads:
            alone = _with(part, (load,))

            def attained(instances: int, alone: Scenario = alone) -> float:
                return _attained(_sized(alone, instances), "static", metric, seeds)

            found = _fewest(attained, level)
            if found is None:
                raise CapacityError(
                    f"{load.model.name} misses its objectives with {MOST_INSTANCES} instances of "
                    f"its own too",
                    needed_bytes=0,
                    available_bytes=0,
                )
            total += found[0] * group.tp
    return total


def parts(scenario: Scenario) -> list[Scenario]:
    """One scenario per group of GPUs, with the models that share it."""
    split = []
    for group in scenario.groups:
        loads = tuple(load for load in scenario.loads if load.model.tp == group.tp)
        if loads:
            split.append(_with(scenario.on([group]), loads))
    return split


def _with(scenario: Scenario, loads: tuple[Load, ...]) -> Scenario:
    """With these models only."""
    trace = scenario.trace
    if trace is not None:
        names = {load.model.name for load in loads}
        trace = tuple(request for request in trace if request.model in names)
    return replace(scenario, loads=loads, trace=trace)


def _fewest(attained: Callable[[int], float], level: float) -> tuple[int, float, float] | None:
    """(instances, attained with them, with one less), by doubling and then halving."""
    below, before = 0, 0.0
    instances = 1
    while (reached := attained(instances)) < level:
        below, before = instances, reached
        instances *= 2
        if instances > MOST_INSTANCES:
            return None
    while instances - below > 1:
        middle = (below + instances) // 2
        value = attained(middle)
        if value >= level:
            instances, reached = middle, value
        else:
            below, before = middle, value
    return instances, reached, before


def _attained(scenario: Scenario, policy: str, metric: str, seeds: Sequence[int]) -> float:
    return fmean(simulate(Run(scenario, policy, seed)).attained[metric] for seed in seeds)


def _sized(scenario: Scenario, instances: int) -> Scenario:
    return scenario.on([scenario.groups[0].sized(instances)])


def _limits(
    part: Scenario,
    policy: str,
    instances: int,
    level: float,
    metric: str,
    seeds: Sequence[int],
) -> tuple[str, ...]:
    if instances == 1:
        return ("one instance is the least",)
    fewer = _sized(part, instances - 1)
    group = fewer.groups[0]
    all_bytes = sum(load.model.device_bytes for load in part.loads)
    share = max(group.memory_share, all_bytes / (group.gpu.memory_bytes * group.tp))
    changed = {
        "link": fewer.on([replace(group, link_share=1e6, switch_s=0.0)]),
        "memory": fewer.on([replace(group, memory_share=share)]),
        "compute": replace(fewer, loads=tuple(_faster(load, group) for load in fewer.loads)),
    }
    return tuple(
        name
        for name, scenario in changed.items()
        if _attained(scenario, policy, metric, seeds) >= level
    )


def _faster(load: Load, group: GpuGroup) -> Load:
    """The same on a GPU that computes in half the time."""
    profile = profile_of(load.model, group.gpu)
    halved = Profile(
        profile.step_s / 2,
        profile.step_per_request_s / 2,
        profile.step_per_context_token_s / 2,
        profile.prefill_s / 2,
        profile.prefill_per_token_s / 2,
    )
    return replace(load, model=replace(load.model, profile=halved))
