"""Many simulations side by side: seeds, policies, scenarios; means, intervals, goodput."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from aegaeon.core.slo import goodput
from aegaeon.sim.simulator import Simulation
from aegaeon.sim.summary import attained
from aegaeon.sim.workload import Scenario

# Turns of a study: shorter ones alternate after every step, which is left out.
SHORTEST_TURN_S = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation of a study."""

    scenario: Scenario
    policy: str
    seed: int = 0
    shortest_turn_s: float = SHORTEST_TURN_S


@dataclass(frozen=True, slots=True)
class Outcome:
    """attained: by the four definitions. split: GPU time by use. warm: switches from the host."""

    attained: dict[str, float]
    split: dict[str, float]
    refused: float
    warm: int

    @property
    def tokens(self) -> float:
        return self.attained["tokens_on_time"]


def simulate(run: Run) -> Outcome:
    """One run, from its scenario and seed."""
    scenario = run.scenario
    simulation = Simulation(
        scenario.models, scenario.groups, run.policy, shortest_turn_s=run.shortest_turn_s
    )
    result = simulation.run(scenario.requests(run.seed))
    whole = result.attainment
    return Outcome(
        attained(whole),
        result.time_split(),
        whole.num_refused / max(1, whole.num_requests),
        result.switches()["warm"],
    )


def simulate_all(
    runs: Sequence[Run],
    *,
    workers: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """In processes of their own, one per core; the outcomes in the order of `runs`.

    on_done: called with the number of runs that are done.
    """
    workers = workers or max(1, os.cpu_count() or 1)
    outcomes: list[Outcome] = []
    if workers == 1 or len(runs) < 4:
        for run in runs:
            outcomes.append(simulate(run))
            if on_done is not None:
                on_done(len(outcomes))
        return outcomes
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for outcome in pool.map(simulate, runs, chunksize=2):
            outcomes.append(outcome)
            if on_done is not None:
                on_done(len(outcomes))
    return outcomes


def interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of its confidence interval (Student's t); of one value, 0."""
    if len(values) < 2:
        return values[0], 0.0
    spread = stdev(values) / math.sqrt(len(values))
    return fmean(values), _student(confidence, len(values) - 1) * spread


def _student(confidence: float, freedom: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees, else expanded around the normal one."""
    if freedom == 1:
        return math.tan(math.pi * confidence / 2)
    if freedom == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def largest(points: Iterable[tuple[float, Sequence[float]]], *, level: float = 0.9) -> float:
    """The largest load whose mean attainment is at least `level`; points: (load, attainments)."""
    return goodput(((load, fmean(values)) for load, values in points), level=level)
