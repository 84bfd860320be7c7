"""Named scenarios. Each is a function of a few numbers; `PRESETS` has them as they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random

from aegaeon.core.errors import ConfigError
from aegaeon.sim.hardware import GPUS, GpuGroup, Model
from aegaeon.sim.workload import (
    LENGTHS,
    Arrivals,
    Beat,
    Gamma,
    Lengths,
    Load,
    OnOff,
    Poisson,
    Scenario,
    zipf_rates,
)

# Of ten models six are of 7B, two of 9B, two of 13B, as in the published artefact.
_MIX = ("Qwen2.5-7B",) * 6 + ("Yi-1.5-9B",) * 2 + ("Llama-2-13B",) * 2


def mixed_model(index: int) -> Model:
    return Model.of(f"m{index}", _MIX[index % len(_MIX)])


def h800(instances: int, *, num_prefill: int = 0) -> GpuGroup:
    return GpuGroup(GPUS["H800"], instances, num_prefill=num_prefill)


def aegaeon(
    rate: float, models: int, *, gpus: int = 16, lengths: Lengths = LENGTHS["chat"]
) -> Scenario:
    """The paper's test bed: Poisson, `rate` per second and model; 6 of 16 GPUs for prefill."""
    return Scenario(
        f"aegaeon-{rate:g}",
        tuple(Load(mixed_model(index), rate, Poisson(), lengths) for index in range(models)),
        (h800(gpus, num_prefill=max(1, round(gpus * 6 / 16))),),
        duration_s=120.0,
    )


def muxserve(alpha: float, *, models: int = 24, total_rate: float = 8.0, gpus: int = 8) -> Scenario:
    """Popularity that falls as a power of the rank."""
    rates = zipf_rates(models, total_rate, alpha)
    return Scenario(
        f"muxserve-a{alpha:g}",
        tuple(Load(mixed_model(index), rate) for index, rate in enumerate(rates)),
        (h800(gpus, num_prefill=gpus * 3 // 8),),
        duration_s=120.0,
    )


def servegen_like(*, models: int = 40, total_rate: float = 6.0, gpus: int = 8) -> Scenario:
    """Few models have most requests, gaps vary widely, many models are idle most of the time."""
    dice = Random("servegen-like")
    rates = zipf_rates(models, total_rate, 1.3)
    lengths = (LENGTHS["chat"], LENGTHS["conversation"], LENGTHS["reasoning"], LENGTHS["chat"])
    loads = []
    for index, rate in enumerate(rates):
        arrivals: Arrivals = Gamma(min(6.0, dice.lognormvariate(0.32, 0.75)))
        if index >= models // 4:
            idle = dice.uniform(0.59, 0.93)
            arrivals = OnOff(on_s=30.0, off_s=30.0 * idle / (1 - idle))
        loads.append(Load(mixed_model(index), rate, arrivals, lengths[index % 4]))
    return Scenario("servegen-like", tuple(loads), (h800(gpus, num_prefill=3),), duration_s=240.0)


def azure_code_like(*, models: int = 12, total_rate: float = 6.0, gpus: int = 4) -> Scenario:
    """Long prompts, short answers, in strong bursts."""
    rates = zipf_rates(models, total_rate, 0.7)
    return Scenario(
        "azure-code-like",
        tuple(
            Load(Model.of(f"m{index}", "Qwen2.5-7B"), rate, Gamma(4.0), LENGTHS["code"])
            for index, rate in enumerate(rates)
        ),
        (h800(gpus, num_prefill=2),),
        duration_s=240.0,
    )


def pingpong(*, period_s: float = 24.0) -> Scenario:
    """A B A A C A B C on one GPU that holds two of the three, with long prompts: what users of
    first-come-first-served swapping complain of.
    """
    beats = {name: [] for name in "abc"}  # type: dict[str, list[float]]
    for place, name in enumerate("abaacabc"):
        beats[name].append(place * period_s / 8)
    return Scenario(
        "pingpong",
        tuple(
            Load(
                Model.of(name, "Qwen2.5-7B"),
                len(times) / period_s,
                Beat(period_s, tuple(times)),
                LENGTHS["long-input"],
            )
            for name, times in beats.items()
        ),
        (h800(1),),
        duration_s=240.0,
    )


def cold_long_tail(*, rare: int = 30, gpus: int = 2) -> Scenario:
    """One model that is always busy, and many that hardly ever are."""
    hot = Load(Model.of("hot", "Qwen2.5-7B"), 2.0)
    return Scenario(
        "cold-long-tail",
        (hot, *(Load(replace(mixed_model(i), name=f"rare{i}"), 0.01) for i in range(rare))),
        (h800(gpus, num_prefill=1),),
        duration_s=300.0,
    )


def production_47(*, gpus_tp1: int = 4, gpus_tp4: int = 8, rate_factor: float = 1.0) -> Scenario:
    """28 models of 1.8 to 7B on single H20s, 19 of 32 to 72B on four each; rates from 0.01 to 1.13
    per second, 0.037 on average. The published figures are the range and the mean only: here one
    model has 1.13, the others fall from 0.02 to 0.01.
    """
    small = ("Qwen1.5-1.8B", "Yi-1.5-6B", "Qwen2.5-7B")
    large = ("Qwen2.5-32B", "Qwen2.5-72B")
    models = [Model.of(f"s{i}", small[i % 3]) for i in range(28)]
    models += [Model.of(f"l{i}", large[i % 2], tp=4) for i in range(19)]
    mean, peak, least = 0.037, 1.13, 0.01
    rest = (mean * len(models) - peak) / (len(models) - 1)
    top = 2 * rest - least
    rates = [peak, *(top + (least - top) * i / 45 for i in range(46))]
    # The hottest is a 7B; the others alternate between the groups.
    order = sorted(range(len(models)), key=lambda i: (i != 2, Random(f"p{i}").random()))
    by_model = dict(zip(order, rates, strict=True))
    return Scenario(
        "production-47",
        tuple(
            Load(model, by_model[i] * rate_factor, Poisson(), LENGTHS["chat"])
            for i, model in enumerate(models)
        ),
        (
            GpuGroup(GPUS["H20"], gpus_tp1),
            GpuGroup(GPUS["H20"], gpus_tp4 // 4, tp=4),
        ),
        duration_s=600.0,
    )


PRESETS: Mapping[str, Callable[[], Scenario]] = {
    "aegaeon-0.1": lambda: aegaeon(0.1, 70),
    "aegaeon-0.5": lambda: aegaeon(0.5, 40),
    "muxserve-a0.9": lambda: muxserve(0.9),
    "servegen-like": servegen_like,
    "azure-code-like": azure_code_like,
    "pingpong": pingpong,
    "cold-long-tail": cold_long_tail,
    "production-47": production_47,
}


def preset(name: str) -> Scenario:
    """Raises ConfigError that lists the names there are."""
    try:
        build = PRESETS[name]
    except KeyError:
        raise ConfigError(
            f"unknown preset {name!r}; expected one of: {', '.join(PRESETS)}"
        ) from None
    return build()
