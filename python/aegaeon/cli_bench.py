"""`aegaeon bench`: what the options mean, and what is printed. The work is in `bench_serve`."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from aegaeon.core.slo import TokenDeadlines, objective_ms

if TYPE_CHECKING:
    from aegaeon.bench_serve import Outcome, Target
    from aegaeon.sim.simulator import Request
    from aegaeon.sim.workload import Arrivals, Lengths

bench = typer.Typer(help="Measure a running server.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure a running server."""


@bench.command()
def serve(
    url: Annotated[str, typer.Option(help="The server, as clients reach it.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME=REQUESTS_PER_S; repeatable. Default: all of the server."),
    ] = None,
    rate: Annotated[
        float, typer.Option(min=1e-6, help="Requests/s of all models without a rate of their own.")
    ] = 1.0,
    zipf: Annotated[
        float, typer.Option(min=0.0, help="How uneven `--rate` is shared out; 0: evenly.")
    ] = 0.0,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma:CV or on-off:ON_S:OFF_S.")
    ] = "poisson",
    lengths: Annotated[
        str, typer.Option(help="chat, code, conversation, reasoning, long-input; or INPUT:OUTPUT.")
    ] = "chat",
    trace: Annotated[
        Path | None, typer.Option(help="A .csv or .jsonl of requests, instead of generated ones.")
    ] = None,
    duration: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which requests are sent; a trace is cut.")
    ] = 60.0,
    ttft_ms: Annotated[float, typer.Option(min=1e-3, help="Objective.")] = 10_000.0,
    tpot_ms: Annotated[float, typer.Option(min=1e-3, help="Objective.")] = 100.0,
    slo: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TTFT_MS:TPOT_MS for one model; repeatable."),
    ] = None,
    send_slo: Annotated[
        bool, typer.Option(help="Send the objectives along, as x-slo-ttft-ms and x-slo-tpot-ms.")
    ] = True,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Where the server asks for one.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds without a byte.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of times, lengths and prompts.")] = 0,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write a line per request to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Send requests at their times; report TTFT, TPOT and SLO attainment per model."""
    from aegaeon import bench_report, bench_serve
    from aegaeon.sim.traces import read_trace

    target = bench_serve.Target(url, api_key, timeout, send_slo)
    own_rates = dict(_rate(each) for each in model or [])
    recorded = None if trace is None else [r for r in read_trace(trace) if r.at_s < duration]
    names = list(own_rates)
    if recorded is not None:
        names = list(dict.fromkeys(each.model for each in recorded))
    served = asyncio.run(bench_serve.served_targets(target, names))
    deadlines = dict.fromkeys(served, TokenDeadlines(ttft_ms / 1e3, tpot_ms / 1e3))
    deadlines |= _objectives(slo or [], served)
    if recorded is None:
        rates = _rates({name: own_rates.get(name) for name in served}, rate, zipf)
        recorded = bench_serve.workload(
            rates,
            arrivals=_arrivals(arrivals),
            lengths=_lengths(lengths),
            duration_s=duration,
            seed=seed,
        )
    requests = [bench_serve.fitted(each, served[each.model]) for each in recorded]
    if not requests:
        raise typer.BadParameter("no request falls into the duration: raise it, or the rate")
    outcomes = _run(target, requests, served, deadlines, seed)
    lasted_s = max(each.ended_s for each in outcomes)
    report = bench_report.summary(outcomes, deadlines, duration_s=lasted_s)
    if csv_file is not None:
        bench_report.write_csv(csv_file, outcomes, deadlines)
    lag_s = max(each.sent_s - each.request.at_s for each in outcomes)
    if as_json:
        facts = {"url": url, "seed": seed, "duration_s": lasted_s, "largest_send_lag_s": lag_s}
        print(json.dumps({**facts, "models": report}))
        return
    console = Console()
    console.print(bench_report.report_table(report))
    for name, each in report.items():
        if each["errors"] and name != bench_report.ALL:
            console.print(f"{name}: {each['errors']}", style="yellow")
    if lag_s > 0.1:
        console.print(
            f"a request was sent {lag_s:.2f} s after its time: this machine was too busy to "
            f"measure well",
            style="yellow",
        )


def _run(
    target: "Target",
    requests: "Sequence[Request]",
    served: Any,
    deadlines: dict[str, TokenDeadlines],
    seed: int,
) -> "list[Outcome]":
    from aegaeon import bench_serve

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("requests", total=len(requests))

        def ended(outcome: "Outcome") -> None:
            progress.advance(bar)

        return asyncio.run(
            bench_serve.run(target, requests, served, deadlines, seed=seed, on_end=ended)
        )


def _rate(text: str) -> tuple[str, float | None]:
    name, _, rate = text.partition("=")
    if not rate:
        return name, None
    per_s = objective_ms(rate)  # the same rule: a finite number above 0
    if per_s is None:
        raise typer.BadParameter(f"--model: got {text!r}; expected NAME or NAME=REQUESTS_PER_S")
    return name, per_s


def _rates(own: dict[str, float | None], total: float, alpha: float) -> dict[str, float]:
    from aegaeon.sim.workload import zipf_rates

    shared = [name for name, rate in own.items() if rate is None]
    shares = dict(zip(shared, zipf_rates(len(shared), total, alpha), strict=True))
    return {name: shares[name] if rate is None else rate for name, rate in own.items()}


def _arrivals(text: str) -> "Arrivals":
    from aegaeon.sim.workload import Gamma, OnOff, Poisson

    kind, *numbers = text.split(":")
    values = [objective_ms(number) for number in numbers]
    match kind, values:
        case "poisson", []:
            return Poisson()
        case "gamma", [float(cv)]:
            return Gamma(cv)
        case "on-off", [float(on_s), float(off_s)]:
            return OnOff(on_s, off_s)
    raise typer.BadParameter(
        f"--arrivals: got {text!r}; expected poisson, gamma:CV or on-off:ON_S:OFF_S"
    )


def _lengths(text: str) -> "Lengths":
    from aegaeon.sim.workload import LENGTHS, Lengths, Tokens

    if text in LENGTHS:
        return LENGTHS[text]
    prompt, _, output = text.partition(":")
    if not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
        raise typer.BadParameter(
            f"--lengths: got {text!r}; expected {', '.join(LENGTHS)}, or INPUT:OUTPUT in tokens"
        )
    fixed = [Tokens(int(each), 0.0, int(each), int(each)) for each in (prompt, output)]
    return Lengths(fixed[0], fixed[1])


def _objectives(given: Sequence[str], served: Any) -> dict[str, TokenDeadlines]:
    found = {}
    for text in given:
        name, _, times = text.partition("=")
        ttft, tpot = (objective_ms(part) for part in times.partition(":")[::2])
        if name not in served or ttft is None or tpot is None:
            raise typer.BadParameter(
                f"--slo: got {text!r}; expected NAME=TTFT_MS:TPOT_MS with one of: "
                f"{', '.join(served)}"
            )
        found[name] = TokenDeadlines(ttft / 1e3, tpot / 1e3)
    return found
