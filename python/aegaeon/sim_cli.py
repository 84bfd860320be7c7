"""`aegaeon sim` and `plan`: what the command line shows of the simulator."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from aegaeon.core.config import load_pool
from aegaeon.core.errors import CapacityError, ConfigError
from aegaeon.core.units import parse_duration
from aegaeon.core.yaml_source import read_yaml
from aegaeon.sim.config import load_workload
from aegaeon.sim.planner import PoolPlan, plan_dedicated, plan_pool
from aegaeon.sim.presets import preset
from aegaeon.sim.report import write_report
from aegaeon.sim.simulator import Result, Simulation, check_policy, check_requests
from aegaeon.sim.summary import METRICS, summary
from aegaeon.sim.traces import read_trace, write_trace
from aegaeon.sim.workload import Scenario

# Worst models shown; --json has all.
_MODELS_SHOWN = 8


def sim(
    workload_file: Annotated[
        Path | None, typer.Argument(metavar="WORKLOAD.YAML", help="Models, loads and GPUs.")
    ] = None,
    preset_name: Annotated[
        str | None, typer.Option("--preset", help="A named scenario; a wrong name lists them.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Repeatable; a wrong one lists them.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the generated workload.")] = None,
    slo_scale: Annotated[float, typer.Option(min=1e-6, help="Multiplies all deadlines.")] = 1.0,
    rate_scale: Annotated[float, typer.Option(min=1e-6, help="Multiplies all rates.")] = 1.0,
    duration: Annotated[str | None, typer.Option(help="Of the arrivals, e.g. 10m.")] = None,
    shortest_turn: Annotated[
        str, typer.Option(help="Turns last at least as long: faster, less exact. 0: exact.")
    ] = "0",
    write: Annotated[
        Path | None, typer.Option(help="Also write the requests: a .csv or .jsonl file.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write plots and one HTML page there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per policy.")] = False,
) -> None:
    """Simulate a pool: which tokens are on time, and what the GPUs do meanwhile."""
    scenario, policies, chosen_seed = _scenario(workload_file, preset_name, policy, seed)
    for name in policies:
        check_policy(name)
    if duration is not None:
        scenario = scenario.lasting(parse_duration(duration))
    scenario = scenario.at_slo(slo_scale).at_rate(rate_scale)
    requests = scenario.requests(chosen_seed)
    if write is not None:
        write_trace(write, requests)
    shown, spans = [], {}
    for name in policies:
        simulation = Simulation(
            scenario.models,
            scenario.groups,
            name,
            shortest_turn_s=parse_duration(shortest_turn),
            keep_spans=report is not None,
        )
        result = _with_progress(simulation, requests, f"{scenario.name} · {name}", as_json)
        shown.append(summary(result, scenario))
        spans[name] = result.spans
        if as_json:
            print(json.dumps(shown[-1]))
    if not as_json:
        console = Console()
        console.print(_table(scenario, shown))
        if len(shown) == 1:
            console.print(_models_table(shown[0]))
    if report is not None:
        with _progress() as progress:
            task = progress.add_task("sweeps for the report", total=None)
            page = write_report(
                report,
                scenario,
                shown,
                spans,
                on_progress=lambda done, of: progress.update(task, completed=done, total=of),
            )
        print(page, file=sys.stderr if as_json else sys.stdout)


def plan(
    pool_file: Annotated[
        Path | None,
        typer.Argument(metavar="POOL.YAML", help="A server's, or a file for `aegaeon sim`."),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="A .csv or .jsonl trace for the pool, or a preset instead of a pool."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: slack and the baselines.")
    ] = None,
    level: Annotated[float, typer.Option(min=0.0, max=1.0, help="Attainment to reach.")] = 0.9,
    metric: Annotated[
        str, typer.Option(help="Of what: one of the names in `aegaeon sim --json`.")
    ] = "tokens_on_time",
    gpu: Annotated[str, typer.Option(help="For a server's file; a wrong one lists them.")] = "H100",
    rate: Annotated[
        float, typer.Option(min=1e-9, help="For a server's file without a trace: per model.")
    ] = 0.1,
    slo_scale: Annotated[float, typer.Option(min=1e-6, help="Multiplies all deadlines.")] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="Workloads to average over.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="The plans as JSON.")] = False,
) -> None:
    """The fewest GPUs that meet the objectives, what limits them, and what the baselines need.

    The numbers of GPUs in the file do not count, only their kinds.
    """
    scenario = _planned(pool_file, workload, gpu, rate).at_slo(slo_scale)
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}; expected one of: {', '.join(METRICS)}")
    chosen = policy or ["slack", "paper", "request-level", "static"]
    for name in chosen:
        check_policy(name)
    plans: list[dict[str, Any]] = []
    with _progress() as progress:
        task = progress.add_task("dedicated", total=None)
        alone = plan_dedicated(scenario, level=level, metric=metric, seeds=range(seeds))
        plans.append({"policy": "dedicated", "num_gpus": alone})
        for name in chosen:
            progress.update(task, description=name)
            try:
                planned = plan_pool(scenario, name, level=level, metric=metric, seeds=range(seeds))
            except CapacityError as error:
                plans.append({"policy": name, "num_gpus": None, "fault": str(error)})
            else:
                plans.append({"policy": name, **_plain(planned)})
    if as_json:
        print(json.dumps({"scenario": scenario.name, "simulated": True, "plans": plans}))
    else:
        Console().print(_plans_table(scenario, plans, level, metric))


def _plain(planned: PoolPlan) -> dict[str, Any]:
    groups = [
        {
            "gpu": part.group.gpu.name,
            "tp": part.group.tp,
            "num_gpus": part.num_gpus,
            "num_models": part.num_models,
            "attained": part.attained,
            "attained_with_one_fewer": part.with_one_fewer,
            "limits": part.limits,
        }
        for part in planned.groups
    ]
    return {"num_gpus": planned.num_gpus, "groups": groups}


def _plans_table(
    scenario: Scenario, plans: list[dict[str, Any]], level: float, metric: str
) -> Table:
    table = Table(
        title=f"{scenario.name}, simulated: fewest GPUs for {len(scenario.loads)} models with "
        f"{metric} of at least {level:.0%}"
    )
    for title in ("", "GPUs", "groups: GPUs, attained, one instance fewer", "limited by"):
        table.add_column(title, justify="right" if title == "GPUs" else "left")
    for each in plans:
        groups = each.get("groups", ())
        table.add_row(
            each["policy"],
            "-" if each["num_gpus"] is None else str(each["num_gpus"]),
            each.get("fault")
            or "\n".join(
                f"{part['num_gpus']} {part['gpu']} (tp {part['tp']}): {part['attained']:.1%}, "
                f"{part['attained_with_one_fewer']:.1%}"
                for part in groups
            ),
            "\n".join(", ".join(part["limits"]) or "several at once" for part in groups),
        )
    return table


def _planned(pool_file: Path | None, workload: str | None, gpu: str, rate: float) -> Scenario:
    is_trace = workload is not None and workload.lower().endswith((".csv", ".jsonl"))
    if pool_file is None:
        if workload is None or is_trace:
            raise ConfigError("give a pool file, or a preset: --workload NAME")
        return preset(workload)
    settings = read_yaml(pool_file).data
    if isinstance(settings, dict) and "gpus" not in settings:
        from aegaeon.sim_pool import scenario_of

        scenario = scenario_of(load_pool(pool_file), pool_file.stem, gpu=gpu, rate=rate)
    else:
        scenario, _ = load_workload(pool_file)
    if workload is None:
        return scenario
    if not is_trace:
        raise ConfigError(f"--workload: got {workload!r}; with a pool file expected a trace")
    trace = tuple(read_trace(workload))
    check_requests(trace, {model.name: model for model in scenario.models})
    return replace(scenario, trace=trace, duration_s=trace[-1].at_s)


def _scenario(
    workload_file: Path | None, preset_name: str | None, policy: list[str] | None, seed: int | None
) -> tuple[Scenario, list[str], int]:
    if (workload_file is None) == (preset_name is None):
        raise ConfigError("give either a workload file or --preset NAME")
    if workload_file is not None:
        scenario, settings = load_workload(workload_file)
        return scenario, policy or [settings.policy], settings.seed if seed is None else seed
    assert preset_name is not None
    return preset(preset_name), policy or ["slack"], seed or 0


def _with_progress(
    simulation: Simulation, requests: list[Any], title: str, as_json: bool
) -> Result:
    if as_json:
        return simulation.run(requests)
    with _progress() as progress:
        task = progress.add_task(title, total=len(requests))
        return simulation.run(
            requests, on_progress=lambda done: progress.update(task, completed=done)
        )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        transient=True,
        console=Console(stderr=True),
    )


def _table(scenario: Scenario, shown: list[dict[str, Any]]) -> Table:
    gpus = ", ".join(
        f"{group.num_gpus} {group.gpu.name}" + (f" (tp {group.tp})" if group.tp > 1 else "")
        for group in scenario.groups
    )
    first = shown[0]
    table = Table(
        title=f"{scenario.name}, simulated: {first['num_models']} models on {gpus}, "
        f"{first['num_requests']} requests"
    )
    table.add_column("")
    rows: dict[str, list[str]] = {}

    def row(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    for each in shown:
        table.add_column(each["policy"], justify="right")
        attainment, split, ttft = each["attainment"], each["gpu_time"], each["ttft_s"]
        row("tokens on time", f"{attainment['tokens_on_time']:.1%}")
        row("requests with 99 % of tokens on time", f"{attainment['requests_on_time']:.1%}")
        row("requests by TTFT and mean TPOT", f"{attainment['requests_in_the_mean']:.1%}")
        row("the artefact's formula", f"{attainment['artefact_formula']:.1%}")
        row("requests refused", str(each["num_refused"]))
        row("first token, p50 / p99", f"{ttft['p50']:.2f} / {ttft['p99']:.2f} s")
        row("GPU time: prompts", f"{split['prefill']:.1%}")
        row("GPU time: tokens", f"{split['decode']:.1%}")
        row("GPU time: switches", f"{split['switch']:.1%}")
        row("GPU time: idle", f"{split['idle']:.1%}")
        row("switches hot / ahead / warm", " / ".join(map(str, each["switches"].values())))
        row("models per GPU", f"{each['models_per_gpu']:.2f}")
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _models_table(shown: dict[str, Any]) -> Table:
    worst = sorted(shown["models"].items(), key=lambda item: item[1]["requests_on_time"])
    table = Table(title=f"The {min(len(worst), _MODELS_SHOWN)} models that fare worst")
    for title in ("model", "requests", "tokens on time", "requests on time"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for name, each in worst[:_MODELS_SHOWN]:
        table.add_row(
            name,
            str(each["num_requests"]),
            f"{each['tokens_on_time']:.1%}",
            f"{each['requests_on_time']:.1%}",
        )
    return table
