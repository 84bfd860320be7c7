"""Small scenarios, and a second simulator: the live step loop over engines that only count."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from aegaeon.core.clock import ManualClock
from aegaeon.core.engine import EngineLoad, EngineRequest
from aegaeon.sched.cost import CostModel, Profile
from aegaeon.sched.step_loop import StepLoop
from aegaeon.sim.hardware import GPUS, Gpu, GpuGroup, Model
from aegaeon.sim.memory import DeviceMemory
from aegaeon.sim.simulator import Request, Simulation

GB = 10**9
PROFILE = Profile(0.0101, 0.00013, 0.0, 0.0171, 0.000023)
# 16 GB for models and a link of 10 GB/s.
SMALL = GpuGroup(Gpu("small", 20 * GB, 16e9, 1e12), 1, memory_share=0.8)


def model(name: str, weights_gb: float = 5.0, **given: object) -> Model:
    values = {"kv_bytes_per_token": 0, "kv_memory_bytes": GB, "profile": PROFILE} | given
    return Model(name, weights_bytes=int(weights_gb * GB), **values)


def random_requests(
    dice: random.Random, models: int, number: int, *, within_s: float
) -> list[Request]:
    """Tokens are few, so that turns and requests end often."""
    return sorted(
        Request(
            dice.uniform(0, within_s), f"m{dice.randrange(models)}", dice.randint(1, 400),
            dice.randint(1, 60),
        )
        for _ in range(number)
    )  # fmt: skip


def token_times(
    models: list[Model],
    groups: list[GpuGroup],
    policy: str,
    requests: list[Request],
    **given: object,
) -> dict[int, list[float]]:
    """By number of the request: when each of its tokens came, in the simulator."""
    times: dict[int, list[float]] = {}

    def note(request, runs):
        times[request.number] = [
            run.first_s + index * run.gap_s for run in runs for index in range(run.count)
        ]

    Simulation(models, groups, policy, on_request=note).run(requests)
    return times


@dataclass
class CountingEngine:
    """`core.engine.Engine` whose steps take what the profile says on a manual clock."""

    name: str
    clock: ManualClock
    costs: CostModel
    coming: list[tuple[int, Request]]
    open: dict[int, Request] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)

    def poll(self) -> None:
        while self.coming and self.coming[0][1].at_s <= self.clock.now():
            number, request = self.coming.pop(0)
            self.open[number] = request
            self.times[number] = []

    def load(self) -> EngineLoad:
        running = sum(1 for number in self.open if self.times[number])
        return EngineLoad(running, len(self.open) - running)

    def requests(self) -> list[EngineRequest]:
        return [
            EngineRequest(
                str(number), request.input_tokens, len(self.times[number]),
                bool(self.times[number]),
            )
            for number, request in self.open.items()
        ]  # fmt: skip

    def has_work(self) -> bool:
        return bool(self.open)

    def run_step(self) -> bool:
        prompts = [r.input_tokens for n, r in self.open.items() if not self.times[n]]
        running = len(self.open) - len(prompts)
        if prompts:
            self.clock.advance(self.costs.prefill_s(self.name, sum(prompts)))
        if running:
            self.clock.advance(self.costs.step_s(self.name, running))
        for number, request in list(self.open.items()):
            self.times[number].append(self.clock.now())
            if len(self.times[number]) == request.output_tokens:
                del self.open[number]
        return True

    def fail(self, error: BaseException) -> None:
        raise error


@dataclass
class TimedResidency:
    """`core.engine.Residency` over the simulator's memory, on a manual clock."""

    memory: DeviceMemory
    clock: ManualClock

    def is_resident(self, name: str) -> bool:
        return self.memory.is_resident(name)

    def missing_bytes(self, name: str) -> int:
        self.memory.settle(self.clock.now())
        return self.memory.missing_bytes(name)

    def activate(self, name: str, evict_first: tuple[str, ...] = ()) -> None:
        switch = self.memory.activate(name, evict_first, self.clock.now())
        if switch is not None:
            self.clock.advance(switch.seconds)

    def prefetch(self, name: str) -> bool:
        return self.memory.prefetch(name, self.clock.now())

    def weights_bytes(self, name: str) -> int:
        return 1000

    def let_go(self, name: str) -> None:
        pass


def step_loop_times(
    models: list[Model], group: GpuGroup, policy: object, requests: list[Request]
) -> dict[int, list[float]]:
    """The same as `token_times`, by the step loop of the live instance, token by token."""
    clock = ManualClock()
    costs = CostModel(
        profiles={each.name: PROFILE for each in models}, link_bytes_per_s=group.link_bytes_per_s
    )
    truth = CostModel(profiles=dict(costs.profiles))
    engines = [
        CountingEngine(
            each.name, clock, truth,
            [(n, r) for n, r in enumerate(requests) if r.model == each.name],
        )
        for each in models
    ]  # fmt: skip
    memory = DeviceMemory(
        capacity_bytes=group.capacity_bytes,
        link_bytes_per_s=group.link_bytes_per_s,
        is_busy=lambda name: next(bool(e.open) for e in engines if e.name == name),
    )
    for each in models:
        memory.add(each, lambda: 0)
    loop = StepLoop(policy, TimedResidency(memory, clock), clock, costs=costs)
    for engine in engines:
        loop.add(engine)
    while True:
        if not loop.run_turn():
            coming = [engine.coming[0][1].at_s for engine in engines if engine.coming]
            if not coming:
                break
            clock.set(max(clock.now(), min(coming)))
    return {number: times for engine in engines for number, times in engine.times.items()}


H800 = GPUS["H800"]
