"""What `aegaeon bench serve` says of its requests: per model and in all."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from aegaeon.bench_serve import Outcome
from aegaeon.core.slo import Attainment, TokenDeadlines, num_on_time
from aegaeon.sched.meter import quantile

ALL = "all"
CSV_COLUMNS = (
    "Request Time", "Model Name", "Input Length", "Output Length", "sent_s", "ended_s", "status",
    "error", "tokens", "tokens_on_time", "ttft_s", "tpot_s",
)  # fmt: skip


def summary(
    outcomes: Sequence[Outcome], deadlines: Mapping[str, TokenDeadlines], *, duration_s: float
) -> dict[str, dict[str, Any]]:
    """By model in the order of `deadlines`, then `all`. Seconds; shares from 0 to 1.

    duration_s: what rates are per: from the first request's time to the last one's end.
    """
    report = {}
    for name in (*deadlines, ALL):
        mine = [each for each in outcomes if name in (each.request.model, ALL)]
        attained = Attainment()
        for each in mine:
            attained.add(
                deadlines[each.request.model],
                each.request.at_s,
                each.runs,
                num_tokens_asked=each.request.output_tokens,
                refused=each.refused,
            )
        report[name] = {
            "requests": len(mine),
            "completed": sum(each.error is None for each in mine),
            "refused": sum(each.refused for each in mine),
            "errors": dict(Counter(each.error for each in mine if each.error is not None)),
            "slo_s": None if name == ALL else vars(deadlines[name]),
            "ttft_s": _quantiles([each.ttft_s for each in mine]),
            "tpot_s": _quantiles([each.tpot_s for each in mine]),
            "tokens": sum(each.num_tokens for each in mine),
            "tokens_per_s": _per(sum(each.num_tokens for each in mine), duration_s),
            "attainment": {
                "tokens_on_time": attained.tokens,
                "requests_99_percent_on_time": attained.requests,
                "requests_in_the_mean": attained.in_the_mean,
                "artifact_formula": attained.lenient,
            },
            "goodput_requests_per_s": _per(attained.num_requests_on_time, duration_s),
        }
    return report


def report_table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per model, and one for all."""
    table = Table(
        "model", "requests", "ok", "refused", "TTFT p50/p99", "TPOT p50/p99", "tok/s",
        "tokens on time", "requests met", "met in the mean", "goodput/s", box=None,
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in report.items():
        attained = each["attainment"]
        table.add_row(
            name,
            str(each["requests"]),
            str(each["completed"]),
            str(each["refused"]),
            _pair(each["ttft_s"]),
            _pair(each["tpot_s"]),
            f"{each['tokens_per_s']:.1f}",
            f"{100 * attained['tokens_on_time']:.1f} %",
            f"{100 * attained['requests_99_percent_on_time']:.1f} %",
            f"{100 * attained['requests_in_the_mean']:.1f} %",
            f"{each['goodput_requests_per_s']:.2f}",
        )
    return table


def write_csv(
    path: Path, outcomes: Sequence[Outcome], deadlines: Mapping[str, TokenDeadlines]
) -> None:
    """One line per request; the first four columns are those of a trace that can be sent again."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for each in outcomes:
            on_time = num_on_time(deadlines[each.request.model], each.request.at_s, each.runs)
            sent = (each.sent_s, each.ended_s, each.status, each.error)
            got = (each.num_tokens, on_time, each.ttft_s, each.tpot_s)
            writer.writerow((*each.request, *sent, *got))


def _quantiles(samples: Sequence[float | None]) -> dict[str, float | None]:
    known = [each for each in samples if each is not None]
    return {"p50": quantile(known, 0.5), "p90": quantile(known, 0.9), "p99": quantile(known, 0.99)}


def _per(number: int, duration_s: float) -> float:
    return number / duration_s if duration_s > 0 else 0.0


def _pair(quantiles: Mapping[str, float | None]) -> str:
    return " / ".join(
        "-" if seconds is None else f"{1e3 * seconds:.3g} ms"
        for seconds in (quantiles["p50"], quantiles["p99"])
    )
