"""The demo's report: tables and a picture of who held the device, for people."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aegaeon.core.config import format_bytes

if TYPE_CHECKING:
    from aegaeon.demo import DemoReport

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_PICTURE_ROWS = 16
_PICTURE_WIDTH = 56


def print_report(report: "DemoReport", console: Console) -> None:
    """Per model, per switch path, occupancy over time, verdict."""
    console.print(_models_table(report))
    console.print(_switches_table(report))
    console.print(_occupancy_picture(report))
    switches = report.state["switches"]
    console.print(
        f"{switches['hot'] + switches['warm']} switches in {report.serve_s:.1f} s, "
        f"{format_bytes(switches['bytes_in'])} in, "
        f"{format_bytes(switches['bytes_out'])} of KV out; "
        f"server ready after {report.start_s:.1f} s, "
        f"ended {report.stop_s:.1f} s after Ctrl-C"
    )
    if report.exact:
        console.print(
            "[bold green]every token identical to the same model served alone[/bold green]"
        )
    else:
        different = sum(model.num_different for model in report.models)
        console.print(f"[bold red]{different} answers differ from plain vLLM[/bold red]")


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _models_table(report: "DemoReport") -> Table:
    table = Table(title="Models", title_justify="left")
    for column in ("model", "weights", "requests", "tokens", "TTFT p50", "TTFT max", "identical"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in report.models:
        ttfts = [answer.ttft_s for answer in model.answers]
        table.add_row(
            model.name,
            format_bytes(model.weight_bytes),
            str(len(model.answers)),
            str(model.num_tokens),
            f"{statistics.median(ttfts):.2f} s",
            f"{max(ttfts):.2f} s",
            f"{len(model.answers) - model.num_different}/{len(model.answers)}",
        )
    return table


def _switches_table(report: "DemoReport") -> Table:
    table = Table(title="Switches", title_justify="left")
    for column in ("path", "count", "p50", "p99", "save", "unmap", "map", "load", "in", "KV out"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for path in ("hot", "warm"):
        records = [record for record in report.switches if record["path"] == path]
        if not records:
            continue
        seconds = [record["seconds"] for record in records]
        table.add_row(
            path,
            str(len(records)),
            _milliseconds(quantile(seconds, 0.5)),
            _milliseconds(quantile(seconds, 0.99)),
            *(_median_ms(records, f"{phase}_s") for phase in ("save", "unmap", "map", "load")),
            format_bytes(sum(record["bytes_in"] for record in records)),
            format_bytes(sum(record["bytes_out"] for record in records)),
        )
    return table


def _median_ms(records: Sequence[dict[str, Any]], key: str) -> str:
    return _milliseconds(statistics.median(record[key] for record in records))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _occupancy_picture(report: "DemoReport") -> Text:
    """One line per moment: a bar as wide as the device memory, coloured by owner."""
    colours = {model.name: _COLOURS[i % len(_COLOURS)] for i, model in enumerate(report.models)}
    picture = Text("Device memory over time: ")
    for name, colour in colours.items():
        picture.append("█ ", style=colour)
        picture.append(f"{name}  ")
    step = max(1, len(report.occupancy) // _PICTURE_ROWS)
    for at, current, held in report.occupancy[::step][:_PICTURE_ROWS]:
        picture.append(f"\n{at:6.1f} s  ")
        used = 0
        for name, colour in colours.items():
            width = round(held.get(name, 0) / report.device_memory_bytes * _PICTURE_WIDTH)
            picture.append("█" * width, style=colour)
            used += width
        picture.append("·" * max(0, _PICTURE_WIDTH - used), style="dim")
        picture.append(f"  {current or ''}")
    return picture
