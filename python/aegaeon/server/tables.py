"""What `aegaeon ps` and `aegaeon top` print of an instance's state, as rich renderables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aegaeon.core.config import format_bytes
from aegaeon.server.history import Cell, History

_LEVELS = " ▁▂▃▄▅▆▇█"
_SWITCH, _STEP, _FREE = "yellow", "cyan", "bright_black"
_OWNERS = ("cyan", "magenta", "green", "blue", "yellow", "red")
_GOOD, _BAD = "green", "bold red"
_GOAL = 0.99


def models_table(state: Mapping[str, Any]) -> Table:
    """One row per model: state, requests, what it holds of the device."""
    table = _table("", "model", "state", "running", "waiting", "device memory", right_from=3)
    for model in state["models"]:
        mapped = sum(unit["mapped_bytes"] for unit in model["units"])
        size = sum(unit["size_bytes"] for unit in model["units"])
        table.add_row(
            *_who(model, state),
            str(model["running"]),
            str(model["waiting"]),
            f"{format_bytes(mapped)} of {format_bytes(size)}",
        )
    return table


def report(history: History, *, width: int) -> RenderableType:
    """All of it, one below the other. width: columns of the terminal."""
    assert history.state is not None
    return Group(
        headline(history.state),
        "",
        objectives_table(history),
        "",
        timeline(history, width=width),
        "",
        switches_table(history.state),
        "",
        memory(history.state, width=width),
    )


def headline(state: Mapping[str, Any]) -> Text:
    """Who holds the device, and how much waits."""
    waiting = sum(model["waiting"] for model in state["models"])
    running = sum(model["running"] for model in state["models"])
    refused = sum(each["count"] for each in state["front"]["refused"])
    holder = state["current"]
    text = Text("on the device: ")
    text.append(holder or "nobody", style="bold cyan" if holder else "dim")
    text.append(f"   running {running}   waiting {waiting}   refused {refused}")
    text.append(f"   turns {state['loop']['turns']}")
    return text


def objectives_table(history: History) -> Table:
    """Per model: queue, TTFT and TPOT of the last requests against the SLO, tokens on time in the
    last minute, requests met since the start.
    """
    state = history.state
    assert state is not None
    columns = ("", "model", "state", "run", "wait", "TTFT p50/p99/SLO", "TPOT p50/p99/SLO")
    table = _table(*columns, "tok/s", "on time", "requests met", right_from=3)
    for model in state["models"]:
        slo, recent = model["slo"], history.recent(model["name"])
        ended = slo["requests_met"] + slo["requests_missed"]
        table.add_row(
            *_who(model, state),
            str(model["running"]),
            str(model["waiting"]),
            _against(slo, "ttft_s"),
            _against(slo, "tpot_s"),
            f"{recent.tokens_per_s:.1f}",
            _share(recent.on_time),
            _share(slo["requests_met"] / ended if ended else None) + f" of {ended}",
        )
    return table


def timeline(history: History, *, width: int) -> Table:
    """One line per model: how much of each half second its steps (or switches to it) took."""
    state = history.state
    assert state is not None
    names = [model["name"] for model in state["models"]]
    per_cell = max(1, round(0.5 / history.slice_s))
    num_cells = max(10, min(120, width - max(map(len, names)) - 4))
    cell_s = per_cell * history.slice_s
    table = Table("", "", box=None, show_header=True, padding=(0, 1), pad_edge=False)
    table.columns[1].header = Text(
        f"last {num_cells * cell_s:g} s: steps, ", style=_STEP, end=""
    ).append("switches", style=_SWITCH)
    table.columns[1].no_wrap = True
    for name in names:
        table.add_row(name, cells_text(history.cells(name, num_cells, per_cell)))
    return table


def cells_text(cells: Sequence[Cell]) -> Text:
    """One character per stretch of time; its height is the share, its colour what took most."""
    text = Text()
    for cell in cells:
        share = min(1.0, cell.switch + cell.step)
        level = 0 if share == 0 else max(1, round(share * (len(_LEVELS) - 1)))
        text.append(_LEVELS[level], style=_SWITCH if cell.switch > cell.step else _STEP)
    return text


def switches_table(state: Mapping[str, Any]) -> Table:
    """Per path: how many, and about how long (bounds of the histogram's buckets)."""
    table = _table("switches", "count", "p50", "p99", "", right_from=1)
    totals = state["switches"]
    for path in ("hot", "warm"):
        buckets = totals["seconds"].get(path, [])
        p50, p99 = (_bound(buckets, share) for share in (0.5, 0.99))
        note = ""
        if path == "warm":
            moved = (
                f"{format_bytes(totals['bytes_in'])} in, {format_bytes(totals['bytes_out'])} out"
            )
            note = f"{moved}, {totals['failed']} failed"
        table.add_row(path, str(totals[path]), p50, p99, note)
    return table


def memory(state: Mapping[str, Any], *, width: int) -> Group:
    """The device's memory as a bar by owner, with a legend."""
    arena = state["arena"]
    capacity = arena["capacity_bytes"]
    columns = max(10, min(120, width - 2))
    bar, legend = Text(), Text()
    owners: dict[str, int] = {}
    for held in arena["held"]:
        owners[held["owner"]] = owners.get(held["owner"], 0) + held["bytes"]
    known = [model["name"] for model in state["models"]]
    for owner, num_bytes in owners.items():
        style = _OWNERS[(known.index(owner) if owner in known else len(known)) % len(_OWNERS)]
        bar.append("█" * round(columns * num_bytes / capacity), style=style)
        tags = ", ".join(
            f"{held['tag']} {format_bytes(held['bytes'])}"
            for held in arena["held"]
            if held["owner"] == owner
        )
        legend.append(f"■ {owner}", style=style).append(f" {tags}   ")
    bar.append("░" * max(0, columns - len(bar)), style=_FREE)
    legend.append("■ free", style=_FREE).append(f" {format_bytes(arena['free_bytes'])}")
    host = state["host_kv"]
    used, all_of_it = format_bytes(host["used_bytes"]), format_bytes(host["capacity_bytes"])
    title = Text(f"device memory {format_bytes(capacity)}; KV on the host {used} of {all_of_it}")
    return Group(title, bar, legend)


def _table(*columns: str, right_from: int) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[right_from:]:
        column.justify = "right"
    return table


def _who(model: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        "▶" if model["name"] == state["current"] else "",
        model["name"],
        model["state"] + (", pinned" if model["pinned"] else ""),
    )


def _against(slo: Mapping[str, Any], objective: str) -> Text:
    recent, limit = slo["recent"][objective], slo[objective]
    text = Text()
    for name in ("p50", "p99"):
        seconds = recent[name]
        late = seconds is not None and seconds > limit
        text.append(_seconds(seconds), style=_BAD if late else "").append("/")
    return text.append(_seconds(limit), style="dim")


def _share(share: float | None) -> Text:
    if share is None:
        return Text("-", style="dim")
    return Text(f"{100 * share:.1f} %", style=_GOOD if share >= _GOAL else _BAD)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3g}s" if seconds >= 1 else f"{seconds * 1e3:.3g}ms"


def _bound(buckets: Sequence[tuple[float | None, int]], share: float) -> str:
    """Of the bucket in which the quantile lies."""
    total = sum(count for _, count in buckets)
    below = 0
    for bound, count in buckets:
        below += count
        if total and below >= share * total:
            return "longer" if bound is None else f"≤ {_seconds(bound)}"
    return "-"
