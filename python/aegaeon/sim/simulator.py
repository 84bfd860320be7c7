"""A pool in simulated time: arrivals are routed, instances take turns, every token has its time.

Deterministic: the same requests, models, pool and policy give the same result. Knows no wall clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aegaeon.core.errors import ConfigError
from aegaeon.core.slo import Attainment, TokenRun
from aegaeon.sched.policies import POLICIES, make_policy
from aegaeon.sched.policies.paper import BatchedDecoding, GroupedPrefill, Paper
from aegaeon.sched.scheduler import Phase, Policy
from aegaeon.sim.account import InstanceTotals, Span
from aegaeon.sim.hardware import GB, GpuGroup, Model, profile_of
from aegaeon.sim.instance import NEVER_S, Instance
from aegaeon.sim.queues import SimRequest
from aegaeon.sim.routing import Central, LateBinding, PaperRouter, Placed, Router, place

# paper: prefill and decode on instances of their own; paper-shared: both on each, as the live
# instance does it.
SIM_POLICIES = (*sorted(POLICIES), "paper-shared")
# Of the instances, where the group does not say: 6 of 16 in the paper.
PREFILL_SHARE = 6 / 16
# In the estimate of what models ask for.
TYPICAL_BATCH = 8


class Request(NamedTuple):
    """One request of a workload: `at_s` from its beginning."""

    at_s: float
    model: str
    input_tokens: int
    output_tokens: int


@dataclass
class Result:
    """What came of a simulation.

    first_s: seconds to the first token of each request that ended, in the order of their ends.
    by_model: attainment of each model. instances: (GPUs, totals) of each. end_s: of the last token.
    """

    policy: str
    by_model: dict[str, Attainment] = field(default_factory=dict)
    first_s: list[float] = field(default_factory=list)
    instances: list[tuple[int, InstanceTotals]] = field(default_factory=list)
    end_s: float = 0.0
    spans: list[Span] = field(default_factory=list)

    @property
    def attainment(self) -> Attainment:
        """Of all models together."""
        whole = Attainment()
        for each in self.by_model.values():
            whole.merge(each)
        return whole

    @property
    def num_gpus(self) -> int:
        return sum(gpus for gpus, _ in self.instances)

    def time_split(self) -> dict[str, float]:
        """Shares of all GPU time until `end_s`; they add up to 1."""
        whole = self.end_s * self.num_gpus
        if not whole:
            return {"prefill": 0.0, "decode": 0.0, "switch": 0.0, "idle": 1.0}
        parts = {
            "prefill": sum(gpus * totals.prefill_s for gpus, totals in self.instances) / whole,
            "decode": sum(gpus * totals.decode_s for gpus, totals in self.instances) / whole,
            "switch": sum(gpus * totals.switch_s for gpus, totals in self.instances) / whole,
        }
        return {**parts, "idle": 1.0 - sum(parts.values())}

    def switches(self) -> dict[str, int]:
        """By path: hot, ahead (prefetched), warm."""
        return {
            path: sum(totals.switches[path] for _, totals in self.instances)
            for path in ("hot", "ahead", "warm")
        }


class Simulation:
    """One run. Raises ConfigError for a policy or model that the pool cannot take."""

    def __init__(
        self,
        models: Sequence[Model],
        groups: Sequence[GpuGroup],
        policy: str,
        *,
        quantum: int = 8,
        make: Callable[[], Policy] | None = None,
        shortest_turn_s: float = 0.0,
        keep_spans: bool = False,
        on_request: Callable[[SimRequest, list[TokenRun]], None] | None = None,
    ) -> None:
        """shortest_turn_s: turns last at least as long; above 0 fewer decisions are simulated.
        make: builds the policy of each instance, instead of the one called `policy`.
        on_request: called with each request that has ended and its tokens.
        """
        if make is None:
            check_policy(policy)
        self._models = {model.name: model for model in models}
        self._groups = groups
        self._policy = policy
        self._make = make or (lambda: _policy(policy, quantum))
        self._on_request = on_request
        self._shortest_turn_s = shortest_turn_s
        self._result = Result(policy)
        self._result.by_model = {model.name: Attainment() for model in models}
        self._spans = self._result.spans if keep_spans else None
        # (time, whose): an instance's number, or that of a call, counted on from the instances.
        self._agenda: list[tuple[float, int]] = []
        self._calls: dict[int, Callable[[float], None]] = {}
        self._next_call = 1 << 40
        self._instances: list[Instance] = []
        check_fits(models, groups)

    def run(
        self,
        requests: Iterable[Request],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> Result:
        """requests: in order of time; on_progress: called now and then with how many have come.

        Raises ConfigError for requests that are not in order, of an unknown model, or longer than
        the KV cache of their model. A simulation runs once.
        """
        requests = list(requests)
        routers = self._routers(requests)
        check_requests(requests, self._models)
        for number, (at_s, name, input_tokens, output_tokens) in enumerate(requests):
            self._run_until(at_s)
            request = SimRequest(number, name, at_s, input_tokens, output_tokens)
            if not routers[name].route(request, at_s):
                self._refuse(request)
            if on_progress is not None and number % 1000 == 0:
                on_progress(number)
        self._run_until(NEVER_S)
        result = self._result
        result.instances = [(each.group.tp, each.totals) for each in self._instances]
        return result

    def _run_until(self, time_s: float) -> None:
        """All that happens before `time_s`; arrivals come before what happens at the same time."""
        agenda, instances, calls = self._agenda, self._instances, self._calls
        while agenda and agenda[0][0] < time_s:
            at_s, number = heapq.heappop(agenda)
            if number < len(instances):
                if instances[number].next_s == at_s:  # else it has been put off
                    instances[number].happen()
            else:
                calls.pop(number)(at_s)

    def _call_at(self, time_s: float, function: Callable[[float], None]) -> None:
        self._calls[self._next_call] = function
        heapq.heappush(self._agenda, (time_s, self._next_call))
        self._next_call += 1

    def _ended(self, request: SimRequest, runs: list[TokenRun], now: float) -> None:
        result, model = self._result, self._models[request.model]
        result.end_s = max(result.end_s, now)
        result.first_s.append(runs[0].first_s - request.arrival_s)
        if self._on_request is not None:
            self._on_request(request, runs)
        result.by_model[model.name].add(
            model.deadlines, request.arrival_s, runs, num_tokens_asked=request.output_tokens
        )

    def _refuse(self, request: SimRequest) -> None:
        self._result.by_model[request.model].add(
            self._models[request.model].deadlines,
            request.arrival_s,
            [],
            num_tokens_asked=request.output_tokens,
            refused=True,
        )

    # -- who goes where --------------------------------------------------------------------

    def _routers(self, requests: Sequence[Request]) -> dict[str, Router]:
        """The router of each model; one per group of GPUs, models of one `tp` share a group."""
        routers: dict[str, Router] = {}
        for group in self._groups:
            models = [model for model in self._models.values() if model.tp == group.tp]
            router = self._router(group, models, requests)
            routers.update({model.name: router for model in models})
        return routers

    def _router(
        self, group: GpuGroup, models: Sequence[Model], requests: Sequence[Request]
    ) -> Router:
        if self._policy == "static":
            return self._placed(group, models, requests)
        if self._policy == "paper" and group.instances > 1:
            num_prefill = group.num_prefill or max(1, round(group.instances * PREFILL_SHARE))
            prefill, decode = [], []
            for index in range(group.instances):
                if index < num_prefill:
                    prefill.append(self._add(group, models, GroupedPrefill(), Phase.PREFILL))
                else:
                    decode.append(self._add(group, models, BatchedDecoding(), Phase.DECODE))
            router: Router = PaperRouter(prefill, decode, self._call_at)
            for each in prefill:
                each.on_prefilled = router.prefilled
            return router
        instances = [self._add(group, models, self._make()) for _ in range(group.instances)]
        late: Central | LateBinding
        if self._policy == "request-level":
            late = Central(instances)
        else:
            late = LateBinding(instances, self._call_at)
        for each in instances:
            each.on_closed = late.closed
        return late

    def _placed(
        self, group: GpuGroup, models: Sequence[Model], requests: Sequence[Request]
    ) -> Router:
        shares = asked_shares(models, group, requests)
        placed = place(models, shares, group.instances, group.capacity_bytes)
        homes: dict[str, list[Instance]] = {}
        for at in placed:
            instance = self._add(group, at, self._make(), shows_all=True)
            for model in at:
                homes.setdefault(model.name, []).append(instance)
        return Placed(homes)

    def _add(
        self,
        group: GpuGroup,
        models: Sequence[Model],
        policy: Policy,
        role: Phase = Phase.BOTH,
        *,
        shows_all: bool = False,
    ) -> Instance:
        instance = Instance(
            len(self._instances),
            group,
            models,
            policy,
            agenda=self._agenda,
            role=role,
            on_end=self._ended,
            shows_all=shows_all,
            shortest_s=self._shortest_turn_s,
            spans=self._spans,
        )
        self._instances.append(instance)
        return instance


def asked_shares(
    models: Sequence[Model], group: GpuGroup, requests: Sequence[Request]
) -> dict[str, float]:
    """The part of one instance's time that each model asks for: prompts, and its steps if its
    requests shared them as well as their TPOT allows.
    """
    seconds = {model.name: 0.0 for model in models}
    profiles = {model.name: profile_of(model, group.gpu) for model in models}
    for _, name, input_tokens, output_tokens in requests:
        if name in seconds:
            profile = profiles[name]
            seconds[name] += profile.prefill_s + profile.prefill_per_token_s * input_tokens
            seconds[name] += profile.step_per_request_s * output_tokens
            seconds[name] += profile.step_s * output_tokens / TYPICAL_BATCH
    span_s = max(1.0, requests[-1].at_s if requests else 1.0)
    return {name: each / span_s for name, each in seconds.items()}


def check_policy(name: str) -> None:
    """Raises ConfigError that lists the policies there are."""
    if name not in SIM_POLICIES:
        raise ConfigError(f"unknown policy {name!r}; expected one of: {', '.join(SIM_POLICIES)}")


def check_fits(models: Sequence[Model], groups: Sequence[GpuGroup]) -> None:
    """Raises ConfigError, one line per fault, for models that no group of GPUs can hold."""
    faults = []
    for tp in sorted({model.tp for model in models}):
        if not any(group.tp == tp for group in groups):
            names = ", ".join(model.name for model in models if model.tp == tp)
            faults.append(f"no GPUs with tp {tp}, which these models want: {names}")
    for tp in sorted({group.tp for group in groups}):
        if sum(group.tp == tp for group in groups) > 1:
            faults.append(f"several entries of `gpus` have tp {tp}; expected one for each tp")
    for group in groups:
        for model in models:
            if model.tp == group.tp and model.device_bytes > group.capacity_bytes:
                faults.append(
                    f"model {model.name!r} needs {model.weights_bytes / GB:.1f} GB of weights + "
                    f"{model.kv_memory_bytes / GB:.1f} GB of KV cache = "
                    f"{model.device_bytes / GB:.1f} GB; {group.tp} x {group.gpu.name} have "
                    f"{group.capacity_bytes / GB:.1f} GB for it: take larger GPUs, more of them "
                    f"(tp), or less kv_memory"
                )
    if faults:
        raise ConfigError("\n".join(faults))


def check_requests(requests: Sequence[Request], models: Mapping[str, Model]) -> None:
    """Raises ConfigError for the first request that cannot be simulated."""
    before_s = 0.0
    for request in requests:
        model = models.get(request.model)
        tokens = request.input_tokens + request.output_tokens
        if model is None:
            raise ConfigError(f"a request wants {request.model!r}, a model that the pool lacks")
        if request.at_s < before_s:
            raise ConfigError(f"requests out of order: {request.at_s} s after {before_s} s")
        if request.input_tokens < 1 or request.output_tokens < 1:
            raise ConfigError(f"a request has at least 1 token each way, got {request}")
        if tokens > model.kv_tokens:
            raise ConfigError(
                f"a request of {request.input_tokens} + {request.output_tokens} tokens does not "
                f"fit into the KV cache of {model.name!r}, which holds {model.kv_tokens}"
            )
        before_s = request.at_s


def _policy(name: str, quantum: int) -> Policy:
    return Paper() if name == "paper-shared" else make_policy(name, quantum=quantum)
