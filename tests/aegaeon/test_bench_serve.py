"""`aegaeon bench serve` against a small real server that streams by a script."""

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from admin_support import listening_on_loopback
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from aegaeon import cli
from aegaeon.bench_serve import ServedTarget, fitted, workload
from aegaeon.sim import simulator
from aegaeon.sim.traces import read_trace
from aegaeon.sim.workload import LENGTHS, Poisson

FIRST_S, GAP_S = 0.05, 0.01


class Scripted:
    """`a` streams well, `b` refuses, `c` breaks off after two tokens, `d` two tokens a chunk."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": name, "max_model_len": 64} for name in "abcd"]})

    async def tokenize(self, request: Request) -> Response:
        return JSONResponse({"tokens": [5, 6, 7], "max_model_len": 64})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append((body, dict(request.headers)))
        if body["model"] == "b":
            error = {"message": "busy", "type": "rate_limit_error", "code": "rate_limit_exceeded"}
            return JSONResponse({"error": error}, status_code=429)
        return StreamingResponse(self.tokens(body), media_type="text/event-stream")

    async def tokens(self, body: dict[str, Any]) -> AsyncIterator[str]:
        wanted = 2 if body["model"] == "c" else body["max_tokens"]
        step = 2 if body["model"] == "d" else 1
        for number in range(step, wanted + step, step):
            await asyncio.sleep(FIRST_S if number == step else GAP_S * step)
            chunk = {
                "choices": [{"text": "x"}],
                "usage": {"completion_tokens": min(number, wanted)},
            }
            yield f"data: {json.dumps(chunk)}\n\n"
        if body["model"] == "c":
            yield f"data: {json.dumps({'error': {'message': 'gone', 'code': 'instance_died'}})}\n\n"
        yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Scripted]]:
    scripted = Scripted()
    with listening_on_loopback(scripted.app) as port:
        yield f"http://127.0.0.1:{port}", scripted


def bench(url: str, *options: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "serve", "--url", url, *options])


def report_of(url: str, *options: str) -> dict[str, Any]:
    done = bench(url, "--json", *options)
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)["models"]
    return report


QUICK = ("--duration", "1", "--lengths", "8:6")


def test_times_are_those_of_the_tokens_at_the_client(server):
    url, _ = server
    report = report_of(url, "--model", "a=6", "--model", "d=6", *QUICK)
    for name in ("a", "d"):
        mine = report[name]
        assert mine["completed"] == mine["requests"] > 0
        assert mine["tokens"] == 6 * mine["requests"]
        assert FIRST_S <= mine["ttft_s"]["p50"] < FIRST_S + 2
        assert mine["attainment"]["requests_99_percent_on_time"] == 1.0
    # Two tokens at once: the mean is over five gaps of which only two took time.
    assert 5 * GAP_S / 5 * 0.9 <= report["a"]["tpot_s"]["p50"] < 1
    assert report["all"]["requests"] == report["a"]["requests"] + report["d"]["requests"]
    assert report["all"]["goodput_requests_per_s"] > 0


def test_refusals_and_broken_streams_count_against_the_slo(server):
    url, _ = server
    report = report_of(url, "--model", "b=6", "--model", "c=6", *QUICK)
    refused, broken = report["b"], report["c"]
    assert refused["refused"] == refused["requests"] > 0
    assert refused["errors"] == {"rate_limit_exceeded": refused["requests"]}
    assert refused["attainment"]["tokens_on_time"] == 0.0
    assert (broken["completed"], broken["refused"]) == (0, 0)
    assert broken["errors"] == {"instance_died": broken["requests"]}
    assert broken["attainment"]["tokens_on_time"] == pytest.approx(2 / 6)
    assert broken["attainment"]["requests_in_the_mean"] == 0.0


def test_objectives_are_sent_along_and_judged_by(server):
    url, scripted = server
    scripted.seen.clear()
    options = ("--model", "a=4", "--model", "d=4", "--slo", "a=1:1", "--ttft-ms", "9000", *QUICK)
    report = report_of(url, *options)
    assert report["a"]["attainment"]["tokens_on_time"] == 0.0
    assert report["d"]["attainment"]["tokens_on_time"] == 1.0
    for body, headers in scripted.seen:
        assert headers["x-slo-ttft-ms"] == ("1" if body["model"] == "a" else "9000")
        assert len(body["prompt"]) == 8
        assert set(body["prompt"]) <= {5, 6, 7}
    scripted.seen.clear()
    report_of(url, "--model", "a=4", "--no-send-slo", *QUICK)
    assert not any("x-slo-ttft-ms" in headers for _, headers in scripted.seen)


def test_the_lines_of_a_run_are_a_trace_that_can_be_sent_again(server, tmp_path: Path):
    url, _ = server
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    report_of(url, "--model", "a=8", "--csv", str(first), *QUICK)
    with first.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["tokens"] == row["tokens_on_time"] == "6" for row in rows)
    assert all(float(row["sent_s"]) >= float(row["Request Time"]) for row in rows)
    report = report_of(url, "--trace", str(first), "--duration", "1", "--csv", str(second))
    assert report["a"]["requests"] == len(rows)
    assert read_trace(first) == read_trace(second)


def test_people_read_a_table_with_what_went_wrong(server):
    url, _ = server
    done = bench(url, "--rate", "12", "--zipf", "1", *QUICK)
    assert done.exit_code == 0, done.output
    assert all(each in done.stdout for each in ("model", "all", "rate_limit_exceeded"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "x"), "does not serve x; it has: a, b, c, d"),
        (("--model", "a=0"), "NAME=REQUESTS_PER_S"),
        (("--arrivals", "gamma"), "gamma:CV"),
        (("--lengths", "0:4"), "INPUT:OUTPUT"),
        (("--slo", "a=5"), "NAME=TTFT_MS:TPOT_MS"),
        (("--slo", "x=5:5"), "one of: a, b, c, d"),
        (("--model", "a=0.001", "--duration", "0.1"), "no request falls into"),
    ],
)
def test_what_cannot_be_measured_is_said(server, options, says):
    done = bench(server[0], *options)
    assert done.exit_code != 0
    assert says in " ".join((done.output + str(done.exception)).replace("│", " ").split())


def test_a_server_that_is_not_there_is_said():
    done = bench("http://127.0.0.1:9")
    assert done.exit_code != 0
    assert "cannot be asked for its models" in str(done.exception)


def test_a_workload_is_the_same_for_a_seed_and_a_model_whoever_else_is_there():
    def made(seed: int, **rates: float) -> list[simulator.Request]:
        options: dict[str, Any] = {"arrivals": Poisson(), "lengths": LENGTHS["chat"]}
        return workload(rates, duration_s=30.0, seed=seed, **options)

    both = made(1, a=2.0, b=1.0)
    assert both == sorted(both)
    assert [each for each in both if each.model == "a"] == made(1, a=2.0)
    assert made(1, a=2.0) != made(2, a=2.0)


def test_a_request_is_shortened_to_what_its_model_takes():
    served = ServedTarget("a", 64, (1,))
    assert fitted(simulator.Request(0, "a", 50, 20), served)[2:] == (44, 20)
    assert fitted(simulator.Request(0, "a", 50, 200), served)[2:] == (1, 63)
    assert fitted(simulator.Request(0, "a", 5, 6), served)[2:] == (5, 6)
