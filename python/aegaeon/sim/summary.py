"""What a simulation shows, as plain values: for JSON, tables and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aegaeon.core.slo import Attainment
from aegaeon.sim.simulator import Result
from aegaeon.sim.workload import Scenario

# Names of the four definitions of `core.slo`; docs/simulation.md explains them.
METRICS: Mapping[str, Callable[[Attainment], float]] = {
    "tokens_on_time": lambda attainment: attainment.tokens,
    "requests_on_time": lambda attainment: attainment.requests,
    "requests_in_the_mean": lambda attainment: attainment.in_the_mean,
    "artefact_formula": lambda attainment: attainment.lenient,
}


def attained(attainment: Attainment) -> dict[str, float]:
    """By all definitions."""
    return {name: value(attainment) for name, value in METRICS.items()}


def quantile(values: Sequence[float], share: float) -> float:
    """Of values in any order; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(result: Result, scenario: Scenario) -> dict[str, Any]:
    """All of it but the timeline. Times in seconds, shares from 0 to 1."""
    whole = result.attainment
    return {
        "scenario": scenario.name,
        "policy": result.policy,
        "simulated": True,
        "num_gpus": result.num_gpus,
        "num_models": len(result.by_model),
        "models_per_gpu": len(result.by_model) / max(1, result.num_gpus),
        "num_requests": whole.num_requests,
        "num_refused": whole.num_refused,
        "num_tokens": whole.num_tokens,
        "end_s": result.end_s,
        "attainment": attained(whole),
        "ttft_s": {
            "p50": quantile(result.first_s, 0.5),
            "p99": quantile(result.first_s, 0.99),
            "max": max(result.first_s, default=0.0),
        },
        "gpu_time": result.time_split(),
        "switches": result.switches(),
        "bytes_in": sum(totals.bytes_in for _, totals in result.instances),
        "bytes_out": sum(totals.bytes_out for _, totals in result.instances),
        "models": {
            name: {"num_requests": each.num_requests, **attained(each)}
            for name, each in result.by_model.items()
        },
    }
