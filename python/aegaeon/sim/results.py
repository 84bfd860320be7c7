"""The paper's results, simulated: `python -m aegaeon.sim.results docs/results.md`.

Writes the document and its plots (in a folder of the same name); what is published stands beside.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from aegaeon.sim.planner import PoolPlan, plan_dedicated, plan_pool
from aegaeon.sim.plots import Line, lines
from aegaeon.sim.presets import PRESETS, aegaeon, preset
from aegaeon.sim.results_text import ASSUMPTIONS, DIFFERENCES, HEAD, PUBLISHED_FLEET
from aegaeon.sim.study import Outcome, Run, interval, largest, simulate_all
from aegaeon.sim.workload import Scenario

POLICIES = ("slack", "paper", "request-level", "static")
SWITCHING = ("slack", "paper", "request-level")
MODELS = {0.1: (16, 32, 48, 64, 72, 80, 96, 112, 128), 0.5: (8, 16, 24, 32, 40, 48, 56, 64)}
SLO_MODELS = 64
STRICT_MODELS = (16, 24, 32, 40, 48, 56, 64, 80, 96)
SLO_SCALES = (1.0, 0.5, 0.3, 0.2)
SWITCH_S = (0.0, 0.1, 0.3, 0.8, 2.0, 27.0)
SWITCH_MODELS = (16, 32, 48, 64, 80, 96)
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
LEVELS = (0.9, 0.99)
FLEET_S = 600.0

Key = tuple[object, ...]


@dataclass
class Study:
    """Runs under keys, and what came of them: one list of outcomes per key, a value per seed."""

    seeds: Sequence[int]
    wanted: dict[Key, list[Run]] = field(default_factory=dict)
    got: dict[Key, list[Outcome]] = field(default_factory=dict)

    def want(self, key: Key, scenario: Scenario, seeds: Sequence[int] | None = None) -> None:
        """Simulate under each seed; the last part of the key is the policy."""
        policy = str(key[-1])
        self.wanted[key] = [Run(scenario, policy, seed) for seed in seeds or self.seeds]

    def run(self, workers: int | None) -> None:
        runs = [run for some in self.wanted.values() for run in some]

        def progress(done: int) -> None:
            if done % 50 == 0 or done == len(runs):
                print(f"{done} of {len(runs)} simulations", file=sys.stderr, flush=True)

        outcomes = iter(simulate_all(runs, workers=workers, on_done=progress))
        for key, some in self.wanted.items():
            self.got[key] = [next(outcomes) for _ in some]

    def values(self, *key: object, metric: str = "tokens_on_time") -> list[float]:
        return [outcome.attained[metric] for outcome in self.got[key]]

    def line(self, xs: Iterable[float], *before: object, policy: str) -> Line:
        return [(x, *interval(self.values(*before, x, policy))) for x in xs]

    def most(
        self,
        xs: Iterable[float],
        *before: object,
        policy: str,
        level: float = 0.9,
        metric: str = "tokens_on_time",
    ) -> float:
        """The largest x that attains the level."""
        points = [(x, self.values(*before, x, policy, metric=metric)) for x in xs]
        return largest(points, level=level)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m aegaeon.sim.results", description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("--seeds", type=int, default=20, help="of the comparison of the presets")
    parser.add_argument("--sweep-seeds", type=int, default=3, help="of each point of a sweep")
    parser.add_argument("--workers", type=int, default=None, help="default: one per core")
    parser.add_argument("--duration", type=float, default=120.0, help="of the arrivals, seconds")
    options = parser.parse_args(arguments)
    study = Study(range(options.sweep_seeds))
    compared = range(options.seeds)
    _want_all(study, options.duration, compared)
    study.run(options.workers)
    plots = options.document.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    sections = [
        HEAD.format(seeds=options.seeds, sweep=options.sweep_seeds, duration=options.duration),
        _models_section(study, plots),
        _slo_section(study, plots),
        _rate_section(study, plots),
        _switch_section(study, plots),
        _presets_section(study, compared),
        _fleet_section(),
        DIFFERENCES,
        ASSUMPTIONS,
    ]
    options.document.write_text("\n".join(sections), encoding="utf-8")


def _want_all(study: Study, duration_s: float, compared: Sequence[int]) -> None:
    for rate, numbers in MODELS.items():
        for number in numbers:
            for policy in POLICIES:
                study.want(("models", rate, number, policy), _bed(rate, number, duration_s))
    for scale in SLO_SCALES:
        for number in STRICT_MODELS:
            for policy in POLICIES:
                scenario = _bed(0.1, number, duration_s).at_slo(scale)
                study.want(("slo", scale, number, policy), scenario)
    for rate in RATES:
        for policy in POLICIES:
            study.want(("rate", rate, policy), _bed(rate, 40, duration_s))
    for seconds in SWITCH_S:
        for number in SWITCH_MODELS:
            for policy in SWITCHING:
                scenario = _with_switches_of(_bed(0.1, number, duration_s), seconds)
                study.want(("switch", seconds, number, policy), scenario)
    for name in PRESETS:
        for scale in (1.0, 0.2):
            scenario = preset(name)
            scenario = scenario.lasting(min(scenario.duration_s, duration_s)).at_slo(scale)
            for policy in POLICIES:
                study.want(("preset", name, scale, policy), scenario, compared)


def _bed(rate: float, models: int, duration_s: float) -> Scenario:
    return aegaeon(rate, models).lasting(duration_s)


def _with_switches_of(scenario: Scenario, seconds: float) -> Scenario:
    """Each switch to a model that is not resident takes so long, whatever its bytes."""
    groups = (
        replace(group, link_share=1e6, switch_s=seconds, prefetch=False)
        for group in scenario.groups
    )
    return scenario.on(groups)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    text += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(text) + "\n"


def _models_section(study: Study, plots: Path) -> str:
    text = ["## Models on 16 GPUs\n"]
    for rate, numbers in MODELS.items():
        before = ("models", rate)
        rows = []
        for policy in POLICIES:
            row = [policy]
            for metric in ("tokens_on_time", "requests_on_time", "artefact_formula"):
                for level in LEVELS:
                    most = study.most(numbers, *before, policy=policy, level=level, metric=metric)
                    row.append(_count(most, numbers))
            most = study.most(numbers, *before, policy=policy)
            row.append(_bound(most, numbers) + f"{most / 16:.1f}")
            rows.append(row)
        text.append(f"Requests per second and model: {rate:g}. Most models with attainment of\n")
        head = ["", *(f"{name} {level:.0%}" for name in ("tokens", "requests", "artefact")
                      for level in LEVELS), "per GPU (tokens 90%)"]  # fmt: skip
        text.append(_table(head, rows))
        curves = {p: study.line(numbers, *before, policy=p) for p in POLICIES}
        name = f"models-{rate:g}"
        marks = {"published: 70": 70.0} if rate == 0.1 else {}
        lines(plots / f"{name}.png", curves, title=f"{rate:g} requests/s per model, 16 H800",
              x_label="models", marks=marks)  # fmt: skip
        text.append(f"![{name}]({plots.name}/{name}.png)\n")
    ours = study.most(MODELS[0.1], "models", 0.1, policy="paper", metric="artefact_formula")
    level = study.most(
        MODELS[0.1], "models", 0.1, policy="request-level", metric="artefact_formula"
    )
    text.append(
        f"Published at 0.1: 70 models on 10 decoding GPUs (7 per decoding GPU, 4.4 of all 16), "
        f"twice the goodput of ServerlessLLM. Ours for `paper`, by the artefact's formula: "
        f"{ours:.0f} models, {ours / 10:.1f} per decoding GPU; `request-level` {level:.0f}.\n"
    )
    return "\n".join(text)


def _count(most: float, numbers: Sequence[float]) -> str:
    if most == 0:
        return f"< {min(numbers)}"
    return _bound(most, numbers) + f"{most:.0f}"


def _bound(most: float, numbers: Sequence[float]) -> str:
    return ">= " if most >= max(numbers) else ""


def _against(ours: float, best: float) -> str:
    """A ratio of which either side may only be known to be at least so much."""
    most = max(STRICT_MODELS)
    if ours >= most and best >= most:
        return "-"
    bound = ">= " if ours >= most else "<= " if best >= most else ""
    return f"{bound}{ours / best - 1:+.0%}"


def _slo_section(study: Study, plots: Path) -> str:
    rows = []
    for scale in SLO_SCALES:
        most = {p: study.most(STRICT_MODELS, "slo", scale, policy=p) for p in POLICIES}
        published = {1.0: "-", 0.5: ">= +50 %", 0.3: ">= +12.5 %", 0.2: "not above MuxServe"}
        best = max(most["request-level"], most["static"], 1.0)
        rows.append([
            f"{scale:g}x", *(_count(most[p], STRICT_MODELS) for p in POLICIES),
            _against(most["paper"], best), _against(most["slack"], best),
            published[scale],
        ])  # fmt: skip
    curves = {
        p: [(s, *interval(study.values("slo", s, SLO_MODELS, p))) for s in reversed(SLO_SCALES)]
        for p in POLICIES
    }
    lines(plots / "slo.png", curves, title=f"{SLO_MODELS} models, 0.1 requests/s each, 16 H800",
          x_label="deadlines, as a multiple of 10 s / 100 ms")  # fmt: skip
    head = ["SLO", *POLICIES, "paper against the better baseline", "slack against it", "published"]
    return (
        "## Stricter objectives\n\nMost models with 90 % of tokens on time, 0.1 requests per "
        f"second and model, 16 GPUs.\n\n{_table(head, rows)}\n![slo]({plots.name}/slo.png)\n"
    )


def _rate_section(study: Study, plots: Path) -> str:
    rows = []
    for policy in POLICIES:
        rows.append([policy, *(
            _rate(study.most(RATES, "rate", policy=policy, level=level, metric=metric))
            for metric in ("tokens_on_time", "artefact_formula") for level in LEVELS
        )])  # fmt: skip
    curves = {p: study.line(RATES, "rate", policy=p) for p in POLICIES}
    lines(plots / "rate.png", curves, title="40 models, 16 H800",
          x_label="requests per second and model")  # fmt: skip
    head = ["", *(f"{n} {level:.0%}" for n in ("tokens", "artefact") for level in LEVELS)]
    return (
        "## Request rate\n\nLargest rate per model, 40 models on 16 GPUs. Published: 2 to 2.5 "
        f"times the rate of ServerlessLLM.\n\n{_table(head, rows)}\n"
        f"![rate]({plots.name}/rate.png)\n"
    )


def _rate(most: float) -> str:
    if most == 0:
        return f"< {min(RATES):g}"
    return f">= {most:.2f}" if most >= max(RATES) else f"{most:.2f}"


def _switch_section(study: Study, plots: Path) -> str:
    rows = []
    for seconds in SWITCH_S:
        most = [study.most(SWITCH_MODELS, "switch", seconds, policy=p) for p in SWITCHING]
        rows.append([f"{seconds:g} s", *(_count(each, SWITCH_MODELS) for each in most)])
    curves = {
        p: [(s, *interval(study.values("switch", s, 64, p))) for s in SWITCH_S] for p in SWITCHING
    }
    lines(plots / "switch.png", curves, title="64 models, 0.1 requests/s each, 16 H800",
          x_label="seconds per switch", log_x=True)  # fmt: skip
    return (
        "## What a switch may cost\n\nMost models with 90 % of tokens on time, 0.1 requests per "
        "second and model, 16 GPUs, if every switch to a model that is not resident took as long "
        "(copies and prefetches left out). 27 s is the paper's starting point, 0.8 s where it "
        f"ends.\n\n{_table(['switch', *SWITCHING], rows)}\n![switch]({plots.name}/switch.png)\n"
    )


def _presets_section(study: Study, seeds: Sequence[int]) -> str:
    text = [
        "## `slack` against the others, on every preset\n",
        f"Tokens on time, means of {len(seeds)} seeds. In brackets: by how much `slack` is better, "
        "in points, with the 95 % confidence interval of the difference seed by seed.\n",
    ]
    losses = []
    for scale in (1.0, 0.2):
        rows = []
        for name in PRESETS:
            ours = study.values("preset", name, scale, "slack")
            row = [name, f"{fmean(ours):.1%}"]
            for policy in POLICIES[1:]:
                theirs = study.values("preset", name, scale, policy)
                mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
                row.append(f"{fmean(theirs):.1%} ({100 * mean:+.1f} ± {100 * half:.1f})")
                if mean + half < 0 and mean < -0.001:
                    losses.append(f"{name} at {scale:g}x to {policy} ({100 * mean:+.1f})")
            rows.append(row)
        text.append(f"Deadlines {scale:g}x:\n")
        text.append(_table(["preset", *POLICIES], rows))
    if losses:
        text.append(f"`slack` loses beyond noise on: {'; '.join(losses)}.\n")
    else:
        text.append("`slack` loses nowhere beyond noise.\n")
    return "\n".join(text)


def _fleet_section() -> str:
    scenario = preset("production-47").lasting(FLEET_S)
    rows = [["dedicated", str(plan_dedicated(scenario)), "", "", ""]]
    for policy in POLICIES:
        plan = plan_pool(scenario, policy)
        rows.append([policy, str(plan.num_gpus), *_plan_row(plan)])
    table = _table(["", "GPUs", "TP=1", "TP=4", "what limits"], rows)
    return f"## The fleet of 47 models\n\n{PUBLISHED_FLEET}\n{table}"


def _plan_row(plan: PoolPlan) -> list[str]:
    parts = [f"{part.num_gpus} ({part.attained:.1%})" for part in plan.groups]
    limits = [f"TP={part.group.tp}: {', '.join(part.limits) or '-'}" for part in plan.groups]
    return [*parts, "; ".join(limits)]


if __name__ == "__main__":
    main()
