"""`aegaeon sim --report DIR`: plots, and one HTML page that needs nothing else.

Beside the scenario as it stands it simulates how attainment depends on models per GPU (the same
models on fewer and more GPUs), on the rate and on the scale of the deadlines.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aegaeon.sim.account import Span
from aegaeon.sim.plots import Line, lines, timeline
from aegaeon.sim.study import Run, interval, simulate_all
from aegaeon.sim.workload import Scenario

GPU_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)
RATE_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)
SLO_FACTORS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
# Of the timeline, from the beginning.
TIMELINE_S = 60.0


def write_report(
    directory: Path,
    scenario: Scenario,
    summaries: Sequence[dict[str, Any]],
    spans: dict[str, list[Span]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `report.html`, its plots as PNGs and `summary.json`; returns the path of the page.

    summaries, spans: of the scenario as it stands, by policy. A recorded trace knows no seeds and
    no other rates: its sweeps are one run per point, without the one over rates.
    """
    directory.mkdir(parents=True, exist_ok=True)
    policies = [each["policy"] for each in summaries]
    seeds = [0] if scenario.trace is not None else list(seeds)
    sweeps = _sweeps(scenario)
    runs = [
        Run(at, policy, seed)
        for _, _, points in sweeps
        for _, at in points
        for policy in policies
        for seed in seeds
    ]
    outcomes = iter(
        simulate_all(
            runs,
            workers=workers,
            on_done=None if on_progress is None else lambda n: on_progress(n, len(runs)),
        )
    )
    images = []
    for name, label, points in sweeps:
        curves: dict[str, list[tuple[float, float, float]]] = {policy: [] for policy in policies}
        for x, _ in points:
            for policy in policies:
                values = [next(outcomes).tokens for _ in seeds]
                curves[policy].append((x, *interval(values)))
        path = directory / f"{name}.png"
        ordered: dict[str, Line] = {policy: sorted(line) for policy, line in curves.items()}
        lines(path, ordered, title=scenario.name, x_label=label)
        images.append(path)
    until_s = min(TIMELINE_S, max(each["end_s"] for each in summaries) or 1.0)
    for policy, some in spans.items():
        path = directory / f"timeline-{policy}.png"
        timeline(path, some, title=f"{scenario.name}, {policy}", until_s=until_s)
        images.append(path)
    (directory / "summary.json").write_text(json.dumps(list(summaries), indent=2) + "\n")
    page = directory / "report.html"
    page.write_text(_page(scenario, summaries, images, len(seeds)), encoding="utf-8")
    return page


def _sweeps(scenario: Scenario) -> list[tuple[str, str, list[tuple[float, Scenario]]]]:
    sizes = {}
    for factor in GPU_FACTORS:
        groups = [g.sized(max(1, round(g.instances * factor))) for g in scenario.groups]
        at = scenario.on(groups)
        sizes[at.num_gpus] = at
    sweeps = [
        (
            "models-per-gpu",
            "models per GPU (the same models, fewer and more GPUs)",
            [(len(scenario.loads) / gpus, at) for gpus, at in sizes.items()],
        ),
        (
            "slo-scale",
            "deadlines, as a multiple of those given",
            [(factor, scenario.at_slo(factor)) for factor in SLO_FACTORS],
        ),
    ]
    if scenario.trace is None:
        rates = [(factor, scenario.at_rate(factor)) for factor in RATE_FACTORS]
        sweeps.insert(1, ("rate", "request rate, as a multiple of that given", rates))
    return sweeps


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""
_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("tokens on time", lambda s: _share(s, "tokens_on_time")),
    ("requests with 99 % of tokens on time", lambda s: _share(s, "requests_on_time")),
    ("requests by TTFT and mean TPOT", lambda s: _share(s, "requests_in_the_mean")),
    ("the artefact's formula", lambda s: _share(s, "artefact_formula")),
    ("requests refused", lambda s: f"{s['num_refused']}"),
    ("first token, p50", lambda s: f"{s['ttft_s']['p50']:.2f} s"),
    ("first token, p99", lambda s: f"{s['ttft_s']['p99']:.2f} s"),
    ("GPU time: prompts", lambda s: f"{s['gpu_time']['prefill']:.1%}"),
    ("GPU time: tokens", lambda s: f"{s['gpu_time']['decode']:.1%}"),
    ("GPU time: switches", lambda s: f"{s['gpu_time']['switch']:.1%}"),
    ("GPU time: idle", lambda s: f"{s['gpu_time']['idle']:.1%}"),
    ("switches, hot / ahead / warm", lambda s: " / ".join(map(str, s["switches"].values()))),
)  # fmt: skip


def _share(summary: dict[str, Any], name: str) -> str:
    return f"{summary['attainment'][name]:.1%}"


def _page(
    scenario: Scenario, summaries: Sequence[dict[str, Any]], images: Sequence[Path], seeds: int
) -> str:
    first = summaries[0]
    head = "".join(f"<th>{html.escape(each['policy'])}</th>" for each in summaries)
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{show(each)}</td>' for each in summaries)}</tr>"
        for name, show in _ROWS
    )
    shown = "".join(
        f'<h2>{html.escape(path.stem)}</h2><img alt="{html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in images
    )
    title = html.escape(scenario.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p><b>Simulated</b>, not measured: {first['num_models']} models on {first['num_gpus']} "
        f"GPUs, {first['num_requests']} requests. Lines are means of {seeds} seed(s), shaded their "
        f"95 % confidence intervals.</p>"
        f"<table><tr><th></th>{head}</tr>{rows}</table>{shown}</body></html>\n"
    )
