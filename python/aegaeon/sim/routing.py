"""Which instance a request goes to. Instances of one router host the same models.

`LateBinding` is ours, for instances that do both phases. `PaperRouter` is Algorithms 1 and 2:
prompts join a group or go to the least loaded prefill instance, prefilled requests join a batch or
go to the decode instance with the shortest work list. `Central` is that of request-level
scaling: a model starts where an instance has nothing else to do. `Placed` knows one fixed
place (or several) per model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from aegaeon.sched.policies.paper import GroupedPrefill
from aegaeon.sim.hardware import Model
from aegaeon.sim.instance import Instance
from aegaeon.sim.queues import SimRequest

# Load of an instance up to which it keeps up. Above 1: not all steps are due when they are made.
FULL = 1.4
# Of it, what a model may start at beside others.
ROOMY = 0.9
# Of the TTFT, how long a request waits for a good place; and for any, in seconds.
PATIENCE = 0.4
MOST_WAIT_S = 60.0


class Router(Protocol):
    def route(self, request: SimRequest, now: float) -> bool:
        """Take a new request to an instance, now or later; False: it is refused."""

    def prefilled(self, instance: Instance, request: SimRequest, now: float) -> None:
        """Its prompt has been computed on an instance for prefill."""


class LateBinding:
    """A request goes where its model has requests and the instance keeps up; else to an instance
    with nothing to do; else to one that has its model on the device and keeps up. Otherwise it
    waits, in front of all instances, for one of these to come about. After `PATIENCE` of its TTFT
    it takes any instance that keeps up, after `MOST_WAIT_S` the least loaded.

    A model that starts early on a busy instance costs its neighbours a switch each turn; one that
    waits for room meets later requests of its own, and they are one batch.

    A single instance gets everything at once, as in the live pool: its policy sees it all.

    call_at(time, function): have the simulator call `function(time)` then.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        call_at: Callable[[float, Callable[[float], None]], None],
    ) -> None:
        self._instances = instances
        self._call_at = call_at
        # By model, the one whose oldest request waits longest first.
        self._waiting: dict[str, list[SimRequest]] = {}

    def route(self, request: SimRequest, now: float) -> bool:
        name = request.model
        chosen = None if name in self._waiting else self._place_for(request)
        if chosen is not None:
            chosen.arrive(request, now)
            return True
        self._waiting.setdefault(name, []).append(request)
        deadlines = self._instances[0].hosted[name].model.deadlines
        self._call_at(
            now + PATIENCE * deadlines.ttft_s, lambda then: self._impatient(request, then, FULL)
        )
        self._call_at(now + MOST_WAIT_S, lambda then: self._impatient(request, then, float("inf")))
        return True

    def prefilled(self, instance: Instance, request: SimRequest, now: float) -> None:
        raise AssertionError("no instance of this router is for prefill only")

    def closed(self, instance: Instance, now: float) -> None:
        """Models that wait start here while there is room for them."""
        while self._waiting:
            fitting = [name for name in self._waiting if self._may_start(instance, name, now)]
            if not fitting:
                return
            name = min(fitting, key=lambda name: self._urgency(instance, name, now))
            self._start(instance, name, now)

    def _place_for(self, request: SimRequest) -> Instance | None:
        if len(self._instances) == 1:
            return self._instances[0]
        name = request.model
        joinable = [
            each
            for each in self._instances
            if name in each.open and each.has_room(request) and _load(each) <= FULL
        ]
        if joinable:
            return min(joinable, key=_load)
        idle = [each for each in self._instances if not each.open]
        if idle:
            return min(idle, key=lambda each: not each.memory.is_resident(name))
        ready = [
            each
            for each in self._instances
            if each.memory.is_resident(name) and _load(each) + _share(each, name) <= ROOMY * FULL
        ]
        return min(ready, key=_load) if ready else None

    def _may_start(self, instance: Instance, name: str, now: float) -> bool:
        if not instance.open:
            return True
        return (
            instance.memory.is_resident(name)
            and _load(instance) + _share(instance, name) <= ROOMY * FULL
            and self._slack_s(instance, name, now) >= 0
        )

    def _urgency(self, instance: Instance, name: str, now: float) -> tuple[bool, bool, float]:
        """Who can be on time comes first; of these whom no switch is needed for, the least slack;
        of the others the oldest.
        """
        slack_s = self._slack_s(instance, name, now)
        if slack_s < 0:
            return (True, False, self._waiting[name][0].arrival_s)
        return (False, not instance.memory.is_resident(name), slack_s)

    def _slack_s(self, instance: Instance, name: str, now: float) -> float:
        due_s = self._waiting[name][0].arrival_s + instance.hosted[name].model.deadlines.ttft_s
        return due_s - now - instance.costs.switch_s(instance.memory.missing_bytes(name))

    def _impatient(self, request: SimRequest, now: float, most_load: float) -> None:
        name = request.model
        if request not in self._waiting.get(name, ()):
            return
        chosen = min(
            self._instances, key=lambda each: (_load(each), not each.memory.is_resident(name))
        )
        if _load(chosen) + _share(chosen, name) <= most_load:
            self._start(chosen, name, now)

    def _start(self, instance: Instance, name: str, now: float) -> None:
        for request in self._waiting.pop(name):
            instance.arrive(request, now)


def _share(instance: Instance, name: str) -> float:
    """What a first request of the model would add to the load."""
    tpot_s = instance.hosted[name].model.deadlines.tpot_s
    return instance.costs.step_s(name, 1) / tpot_s


def _load(instance: Instance) -> float:
    """The share of its time that an instance needs for a step per TPOT of each model with open
    requests, and its waiting prompts as a share of their TTFT.
    """
    load, costs = 0.0, instance.costs
    for name, hosted in instance.open.items():
        queue, deadlines = hosted.queue, hosted.model.deadlines
        batch = max(1, queue.num_open)
        load += costs.step_s(name, batch, queue.context_tokens) / deadlines.tpot_s
        if queue.prefill_tokens:
            load += costs.prefill_s(name, queue.prefill_tokens) / deadlines.ttft_s
    return load


class PaperRouter:
    """call_at(time, function): have the simulator call `function(time)` then."""

    def __init__(
        self,
        prefill: Sequence[Instance],
        decode: Sequence[Instance],
        call_at: Callable[[float, Callable[[float], None]], None],
    ) -> None:
        self._prefill = [(each, _grouped(each)) for each in prefill]
        self._decode = decode
        self._call_at = call_at

    def route(self, request: SimRequest, now: float) -> bool:
        joinable = (each for each in self._prefill if each[1].has_room(request.model))
        instance, groups = next(joinable, None) or min(
            self._prefill, key=lambda each: _pending_s(each[0], each[1], now)
        )
        groups.add(request.model)
        instance.arrive(request, now)
        return True

    def prefilled(self, instance: Instance, request: SimRequest, now: float) -> None:
        """The KV cache goes through the host: out, and in at once where its model is running."""
        joinable = (
            each for each in self._decode if each.is_open(request.model) and each.has_room(request)
        )
        chosen = next(joinable, None) or min(
            self._decode,
            key=lambda each: (len(each.open), not each.memory.is_resident(request.model)),
        )
        model = chosen.hosted[request.model].model
        copied_bytes = request.input_tokens * model.kv_bytes_per_token
        seconds = copied_bytes / instance.group.link_bytes_per_s
        if chosen.memory.is_resident(request.model):
            seconds += copied_bytes / chosen.group.link_bytes_per_s
        self._call_at(now + seconds, lambda then: chosen.hand_over(request, then))


def _grouped(instance: Instance) -> GroupedPrefill:
    assert isinstance(instance.policy, GroupedPrefill)
    return instance.policy


def _pending_s(instance: Instance, groups: GroupedPrefill, now: float) -> float:
    if not groups.groups:
        return 0.0
    state = instance.state(now)
    return groups.load_s(state.models, state)


class Central:
    """Requests of a model join an instance that runs it; others wait in one queue, first come first
    served, for an instance that has nothing to do.
    """

    def __init__(self, instances: Sequence[Instance]) -> None:
        self._instances = instances
        self._waiting: dict[str, list[SimRequest]] = {}

    def route(self, request: SimRequest, now: float) -> bool:
        name = request.model
        running = [e for e in self._instances if e.is_open(name) and e.has_room(request)]
        free = running or [each for each in self._instances if not each.open]
        if not free:
            self._waiting.setdefault(name, []).append(request)
            return True
        min(free, key=lambda each: not each.memory.is_resident(name)).arrive(request, now)
        return True

    def prefilled(self, instance: Instance, request: SimRequest, now: float) -> None:
        raise AssertionError("no instance of this router is for prefill only")

    def closed(self, instance: Instance, now: float) -> None:
        """The model whose oldest request waits longest: the first in the order of insertion."""
        name = next(iter(self._waiting), None)
        if name is None or instance.open:
            return
        for request in self._waiting.pop(name):
            instance.arrive(request, now)


class Placed:
    """homes: the instances of each model; of several, the least loaded takes the request."""

    def __init__(self, homes: Mapping[str, Sequence[Instance]]) -> None:
        self._homes = homes

    def route(self, request: SimRequest, now: float) -> bool:
        homes = self._homes.get(request.model)
        if not homes:
            return False
        min(homes, key=lambda each: _load(each) if each.open else 0.0).arrive(request, now)
        return True

    def prefilled(self, instance: Instance, request: SimRequest, now: float) -> None:
        raise AssertionError("no instance of this router is for prefill only")


def place(
    models: Sequence[Model], shares: Mapping[str, float], instances: int, capacity_bytes: int
) -> list[list[Model]]:
    """The models of each instance, none beyond its capacity.

    shares: the part of an instance's time that each model asks for. The most asked for first, each
    to the instance that is asked least and has room; then what memory is left takes further copies
    of those that ask for most per copy.
    """
    placed: list[list[Model]] = [[] for _ in range(instances)]
    free = [capacity_bytes] * instances
    copies: dict[str, list[int]] = {}

    def load(instance: int) -> float:
        return sum(shares[each.name] / len(copies[each.name]) for each in placed[instance])

    def put(model: Model) -> bool:
        at = copies.get(model.name, [])
        roomy = [i for i in range(instances) if free[i] >= model.device_bytes and i not in at]
        if not roomy:
            return False
        chosen = min(roomy, key=load)
        copies[model.name] = [*at, chosen]
        free[chosen] -= model.device_bytes
        placed[chosen].append(model)
        return True

    ordered = sorted(models, key=lambda model: -shares[model.name])
    for model in ordered:
        put(model)
    more = [model for model in ordered if model.name in copies]
    while more:
        model = max(more, key=lambda each: shares[each.name] / len(copies[each.name]))
        if not put(model):
            more.remove(model)
    return placed
