"""Plots of simulations, by matplotlib, which is imported only here and only when one is drawn.

The extra `sim` installs it. No display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aegaeon.core.errors import AegaeonError
from aegaeon.sim.account import Span

COLOURS = {
    "slack": "#0072b2",
    "paper": "#d55e00",
    "request-level": "#009e73",
    "static": "#7f7f7f",
    "fcfs": "#cc79a7",
    "round-robin": "#e69f00",
    "paper-shared": "#56b4e9",
}
_DPI = 80
# Rows and time of a timeline beyond which it could not be read.
TIMELINE_INSTANCES = 16


class MissingMatplotlib(AegaeonError):
    """A plot was asked for without matplotlib. Handled by the command line."""


# Of one line: x, mean, and half the width of the confidence interval, point by point.
Line = Sequence[tuple[float, float, float]]


def lines(
    path: Path,
    curves: Mapping[str, Line],
    *,
    title: str,
    x_label: str,
    y_label: str = "tokens on time",
    level: float | None = 0.9,
    marks: Mapping[str, float] | None = None,
    log_x: bool = False,
) -> None:
    """One line per policy, its interval shaded. marks: published values, as vertical lines."""
    figure, axes = _axes(7.0, 3.6)
    for name, points in curves.items():
        xs, means, halves = zip(*points, strict=True)
        colour = COLOURS.get(name)
        axes.plot(xs, means, marker="o", markersize=3, label=name, color=colour)
        low = [mean - half for mean, half in zip(means, halves, strict=True)]
        high = [mean + half for mean, half in zip(means, halves, strict=True)]
        axes.fill_between(xs, low, high, alpha=0.15, color=colour)
    if level is not None:
        axes.axhline(level, color="black", linewidth=0.7, linestyle=":")
        axes.set_ylim(0, 1.03)
    for text, x in (marks or {}).items():
        axes.axvline(x, color="black", linewidth=0.7, linestyle="--")
        axes.annotate(text, (x, 0.02), rotation=90, fontsize=7, ha="right")
    if log_x:
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=0)
    axes.set_title(f"{title} (simulated)", fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def timeline(path: Path, spans: Sequence[Span], *, title: str, until_s: float) -> None:
    """Which model holds which instance; switches are grey."""
    shown = [s for s in spans if s.start_s < until_s and s.instance < TIMELINE_INSTANCES]
    names = sorted({span.model for span in shown})
    rows = 1 + max((span.instance for span in shown), default=0)
    figure, axes = _axes(9.0, 1.2 + 0.35 * rows)
    colours = _many_colours(len(names))
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in shown:
        key = (span.instance, span.model if span.kind == "run" else "")
        width = min(span.end_s, until_s) - span.start_s
        bars.setdefault(key, []).append((span.start_s, width))
    for (instance, name), ranges in bars.items():
        colour = colours[names.index(name)] if name else "#cccccc"
        axes.broken_barh(ranges, (instance - 0.4, 0.8), facecolors=colour)
    axes.set_yticks(range(rows))
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(0, until_s)
    axes.set_xlabel("seconds")
    axes.set_ylabel("instance")
    axes.set_title(f"{title} (simulated): one colour per model, switches grey", fontsize=10)
    _save(figure, path)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    try:
        import matplotlib.figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingMatplotlib(
            "plots need matplotlib: pip install 'aegaeon-kernels[sim]'"
        ) from error
    # Not pyplot: that would pick a backend by the display and keep every figure.
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="tight")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _many_colours(number: int) -> list[Any]:
    import matplotlib

    palette = matplotlib.colormaps["gist_ncar"]
    return [palette(0.05 + 0.9 * index / max(1, number - 1)) for index in range(number)]


def _save(figure: Any, path: Path) -> None:
    # Without the version in it the file is the same again.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
