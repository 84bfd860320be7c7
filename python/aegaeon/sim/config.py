"""`workload.yaml`: models, what they are asked for, and the GPUs they share, for `aegaeon sim`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from aegaeon.core.config import POLICIES, Size, Slo, Strict, parse_duration, validated
from aegaeon.core.errors import ConfigError
from aegaeon.core.slo import TokenDeadlines
from aegaeon.core.yaml_source import YamlSource, read_yaml, spell
from aegaeon.sched.cost import PUBLISHED_LINK_SHARE, Profile
from aegaeon.sim.hardware import GPUS, SHAPES, Gpu, GpuGroup, Model
from aegaeon.sim.simulator import SIM_POLICIES, check_fits
from aegaeon.sim.traces import read_trace
from aegaeon.sim.workload import (
    LENGTHS,
    Arrivals,
    Diurnal,
    Gamma,
    GroupBurst,
    Lengths,
    Load,
    OnOff,
    Poisson,
    Scenario,
    Tokens,
    zipf_rates,
)

assert set(POLICIES) <= set(SIM_POLICIES)

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class TokensConfig(Strict):
    """Lognormal, cut to [min, max]."""

    median: Positive
    sigma: Annotated[float, Field(ge=0)] = 0.0
    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 8192

    def tokens(self) -> Tokens:
        return Tokens(self.median, self.sigma, self.min, self.max)


class LengthsConfig(Strict):
    """Prompts and outputs, in tokens."""

    input: TokensConfig
    output: TokensConfig


class ArrivalsConfig(Strict):
    """When requests come. cv: of gamma. on_s, off_s: of on-off. period_s, swing: of diurnal.
    group, burst_s, every_s, boost: of group-burst.
    """

    process: Literal["poisson", "gamma", "on-off", "diurnal", "group-burst"] = "poisson"
    cv: Positive = 1.0
    on_s: Positive = 30.0
    off_s: Positive = 60.0
    period_s: Positive = 86_400.0
    swing: Annotated[float, Field(ge=0, le=1)] = 0.8
    group: str = "group"
    burst_s: Positive = 20.0
    every_s: Positive = 200.0
    boost: Annotated[float, Field(ge=1)] = 5.0

    def arrivals(self) -> Arrivals:
        match self.process:
            case "gamma":
                return Gamma(self.cv)
            case "on-off":
                return OnOff(self.on_s, self.off_s)
            case "diurnal":
                return Diurnal(self.period_s, self.swing)
            case "group-burst":
                return GroupBurst(self.group, self.burst_s, self.every_s, self.boost)
            case _:
                return Poisson()


class ProfileConfig(Strict):
    """Seconds: a step is step + step_per_request x requests + step_per_context_token x tokens; a
    prefill is prefill + prefill_per_token x tokens.
    """

    step_s: Positive
    step_per_request_s: Annotated[float, Field(ge=0)] = 0.0
    step_per_context_token_s: Annotated[float, Field(ge=0)] = 0.0
    prefill_s: Annotated[float, Field(ge=0)] = 0.0
    prefill_per_token_s: Annotated[float, Field(ge=0)] = 0.0

    def profile(self) -> Profile:
        return Profile(**self.model_dump())


class ModelEntry(Strict):
    """One model, or `count` alike with names that end in -0, -1 ..."""

    name: str = Field(min_length=1)
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    shape: str | None = None
    """A known checkpoint; its sizes and times are used where none are given."""
    weights: Size | None = None
    kv_bytes_per_token: Annotated[int, Field(ge=0)] | None = None
    kv_memory: Size | None = None
    """KV cache range on the device while the model is resident."""
    profile: ProfileConfig | None = None
    tp: Annotated[int, Field(ge=1, le=64)] = 1
    slo: Slo = Slo()
    priority: int = 0
    rate: Positive = 0.1
    """Requests per second of each."""
    zipf: Annotated[float, Field(ge=0)] = 0.0
    """Spread `rate` x `count` as (i + 1) ** -zipf over them."""
    arrivals: ArrivalsConfig = ArrivalsConfig()
    lengths: str | LengthsConfig = "chat"

    @field_validator("shape")
    @classmethod
    def _shape_is_known(cls, value: str | None) -> str | None:
        return value if value is None else _one_of(value, SHAPES)

    @field_validator("lengths")
    @classmethod
    def _lengths_are_known(cls, value: Any) -> Any:
        return _one_of(value, LENGTHS) if isinstance(value, str) else value

    def loads(self) -> list[Load]:
        shape = SHAPES[self.shape] if self.shape else None
        names = [self.name] if self.count == 1 else [f"{self.name}-{i}" for i in range(self.count)]
        rates = zipf_rates(self.count, self.rate * self.count, self.zipf)
        lengths = self.lengths
        if isinstance(lengths, LengthsConfig):
            drawn = Lengths(lengths.input.tokens(), lengths.output.tokens())
        else:
            drawn = LENGTHS[lengths]
        sizes = {
            "weights_bytes": self.weights or (shape.weights_bytes if shape else None),
            "kv_memory_bytes": self.kv_memory or (shape.kv_memory_bytes if shape else None),
            "kv_bytes_per_token": self.kv_bytes_per_token
            if self.kv_bytes_per_token is not None
            else (shape.kv_bytes_per_token if shape else None),
        }
        missing = [key.removesuffix("_bytes") for key, value in sizes.items() if value is None]
        if missing:
            raise ValueError(f"expected a `shape`, or also {', '.join(missing)}")
        return [
            Load(
                Model(
                    name=name,
                    weights_bytes=sizes["weights_bytes"] or 0,
                    kv_bytes_per_token=sizes["kv_bytes_per_token"] or 0,
                    kv_memory_bytes=sizes["kv_memory_bytes"] or 0,
                    shape=self.shape or "",
                    tp=self.tp,
                    deadlines=TokenDeadlines(self.slo.ttft_ms / 1e3, self.slo.tpot_ms / 1e3),
                    priority=self.priority,
                    profile=None if self.profile is None else self.profile.profile(),
                ),
                rate,
                self.arrivals.arrivals(),
                drawn,
            )
            for name, rate in zip(names, rates, strict=True)
        ]


class GpuEntry(Strict):
    """`count` GPUs of one kind, in instances of `tp` each."""

    gpu: str
    count: Annotated[int, Field(ge=1, le=100_000)]
    tp: Annotated[int, Field(ge=1, le=64)] = 1
    prefill: Annotated[int, Field(ge=0)] = 0
    """Instances that only prefill, where the policy separates the phases; 0: 6 of 16."""
    memory: Size | None = None
    """Of one GPU, if it is not the usual size."""
    memory_share: Share = 0.9
    """For weights and KV cache."""
    link_gb_s: Positive | None = None
    """Effective bandwidth from the host; null: 62.5 % of the nominal one."""
    switch_s: Annotated[float, Field(ge=0)] = 0.0
    """Fixed time of each switch that moves bytes, beside the copies."""
    prefetch: bool = True

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return _one_of(value, GPUS)

    def group(self) -> GpuGroup:
        known = GPUS[self.gpu]
        link, share = known.link_bytes_per_s, PUBLISHED_LINK_SHARE
        if self.link_gb_s is not None:
            link, share = self.link_gb_s * 1e9, 1.0
        if self.count % self.tp:
            raise ValueError(f"expected a `count` that is a multiple of tp = {self.tp}")
        if self.prefill and self.prefill >= self.count // self.tp:
            raise ValueError(f"expected fewer than {self.count // self.tp} instances in `prefill`")
        return GpuGroup(
            Gpu(known.name, self.memory or known.memory_bytes, link, known.hbm_bytes_per_s),
            self.count // self.tp,
            tp=self.tp,
            num_prefill=self.prefill,
            memory_share=self.memory_share,
            link_share=share,
            switch_s=self.switch_s,
            prefetch=self.prefetch,
        )


class WorkloadConfig(Strict):
    """What `aegaeon sim` simulates."""

    gpus: tuple[GpuEntry, ...] = Field(strict=False, min_length=1)
    models: tuple[ModelEntry, ...] = Field(strict=False, min_length=1)
    duration: float = 300.0
    """Arrivals are generated for as long."""
    trace: str | None = None
    """A .csv or .jsonl file with the requests, instead of generated ones."""
    policy: str = "slack"
    seed: int = 0

    @field_validator("duration", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return parse_duration(value)

    @field_validator("policy")
    @classmethod
    def _policy_is_known(cls, value: str) -> str:
        return _one_of(value, SIM_POLICIES)


def load_workload(path: str | Path) -> tuple[Scenario, WorkloadConfig]:
    """Read and check a workload file and its trace. Raises ConfigError that lists the faults."""
    source = read_yaml(Path(path))
    settings = validated(source, WorkloadConfig)
    faults: list[str] = []
    groups = [
        _built(entry.group, source, ("gpus", i), faults) for i, entry in enumerate(settings.gpus)
    ]
    loads = [
        _built(entry.loads, source, ("models", i), faults)
        for i, entry in enumerate(settings.models)
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    flat = tuple(load for some in loads if some for load in some)
    names = [load.model.name for load in flat]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{source.path}: several models are called {', '.join(twice)}")
    scenario = Scenario(
        Path(path).stem,
        flat,
        tuple(group for group in groups if group is not None),
        duration_s=settings.duration,
    )
    check_fits(scenario.models, scenario.groups)
    if settings.trace is not None:
        trace = tuple(read_trace(source.path.absolute().parent / settings.trace))
        unknown = sorted({request.model for request in trace} - set(names))
        if unknown:
            raise ConfigError(
                f"{settings.trace}: asks for models that {source.path} lacks: {', '.join(unknown)}"
            )
        duration_s = trace[-1].at_s
        scenario = Scenario(scenario.name, flat, scenario.groups, duration_s, trace)
    return scenario, settings


def _built(build: Any, source: YamlSource, key: tuple[str | int, ...], faults: list[str]) -> Any:
    try:
        return build()
    except ValueError as error:
        faults.append(f"{source.where(key)}: {spell(key)}: {error}")


def _one_of(value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"expected one of: {', '.join(known)}")
    return value
