"""Which instance a request goes to. Instances of one router host the same models.

`JoinFirst` is the paper's rule for instances that do both phases: join an instance where the model
has open requests and that can keep up, else the least loaded. `PaperRouter` is Algorithms 1 and 2:
prompts join a group or go to the least loaded prefill instance, prefilled requests join a batch or
go to the decode instance with the shortest work list. `Central` binds late, as request-level
scaling does: a model starts where an instance has nothing else to do. `Placed` knows one fixed
place (or several) per model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from aegaeon.sched.policies.paper import GroupedPrefill
from aegaeon.sim.hardware import Model
from aegaeon.sim.instance import Instance
from aegaeon.sim.queues import SimRequest


class Router(Protocol):
    def route(self, request: SimRequest, now: float) -> bool:
        """Take a new request to an instance, now or later; False: it is refused."""

    def prefilled(self, instance: Instance, request: SimRequest, now: float) -> None:
        """Its prompt has been computed on an instance for prefill."""

    def idle(self, instance: Instance, now: float) -> None:
        """The instance has no open request."""


class JoinFirst:
    """Load: the share of its time that an instance needs for a step per TPOT of each model with
    open requests, and its waiting prompts as a share of their TTFT. 1: it is full.
    """

    def __init__(self, instances: Sequence[Instance]) -> None:
        self._instances = instances

    def route(self, request: SimRequest, now: float) -> bool:
        name = request.model
        joinable = [
            each
            for each in self._instances
            if each.open and name in each.open and each.has_room(request) and _load(each) <= 1.0
        ]
        if joinable:
            chosen = joinable[0] if len(joinable) == 1 else min(joinable, key=_load)
        else:
            chosen = min(
                self._instances,
                key=lambda each: (
                    _load(each) if each.open else 0.0,
                    not each.memory.is_resident(name),
                ),
            )
        chosen.arrive(request, now)
        return True

    def prefilled(self, instance: Instance, request: SimRequest, now: float) -> None:
        raise AssertionError("no instance of this router is for prefill only")

    def idle(self, instance: Instance, now: float) -> None:
        return


def _load(instance: Instance) -> float:
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

    def idle(self, instance: Instance, now: float) -> None:
        return


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

    def idle(self, instance: Instance, now: float) -> None:
        """The model whose oldest request waits longest: the first in the order of insertion."""
        name = next(iter(self._waiting), None)
        if name is None:
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

    def idle(self, instance: Instance, now: float) -> None:
        return


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
