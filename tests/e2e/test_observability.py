"""What a real server tells of itself, and that its documentation says the same."""

import gzip
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from e2e_support import KV_MEMORY, MAX_MODEL_LEN, job_for
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from prometheus_client.parser import text_string_to_metric_families

from aegaeon.local_server import LocalServer, local_server

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen3")
DOCS = Path(__file__).parent.parent.parent / "docs"
ROW = re.compile(r"^\| `(aegaeon_\w+)` \| (\w+) \| (.*?) \|", re.MULTILINE)


class Collector:
    """An OpenTelemetry collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Taking(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
                for resource in message.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Taking)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def requests(self) -> dict[str, Any]:
        """The spans of requests by their ids."""
        return {
            each.value.string_value: span
            for span in self.spans
            for each in span.attributes
            if each.key == "aegaeon.request_id"
        }


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory, collector) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("observed")
    models = tiny_models(*NAMES)
    pool = folder / "pool.yaml"
    pool.write_text(
        yaml.safe_dump(
            {
                "device": "host",
                "device_memory": job_for(models, {})["device_memory"],
                "defaults": {
                    "kv_memory": KV_MEMORY,
                    "max_model_len": MAX_MODEL_LEN,
                    "slo": {"ttft_ms": 60_000, "tpot_ms": 10_000},
                },
                "models": [{"model": path, "name": name} for name, path in models.items()],
                "scheduler": {"quantum": 2},
                "observability": {"log_requests": True, "otlp_endpoint": collector.address},
                "admin": {"socket": str(folder / "admin.sock")},
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEGAEON_LOG_FORMAT", "json")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with local_server(pool, log=folder / "log") as running:
            yield running


def complete(server: LocalServer, model: str, **options: Any) -> httpx.Response:
    headers = options.pop("headers", {})
    body = {"model": model, "prompt": "Once upon a time", "ignore_eos": True, **options}
    url = f"{server.address}/v1/completions"
    return httpx.post(url, json={"max_tokens": 6, **body}, headers=headers, timeout=60)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def families(server: LocalServer) -> dict[str, Any]:
    text = httpx.get(f"{server.address}/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(server: LocalServer, name: str, **labels: str) -> float:
    family = families(server)[name.removesuffix("_total")]
    found = [s for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(sample.value for sample in found)


def test_the_documented_metrics_are_those_that_are_exported(server):
    for name in NAMES:
        assert complete(server, name).status_code == 200
    exported = {}
    for family in families(server).values():
        # `_created` are the client library's own: when a series began.
        if family.name.startswith("aegaeon_") and not family.name.endswith("_created"):
            labels = {key for sample in family.samples for key in sample.labels} - {"le"}
            name = family.name + ("_total" if family.type == "counter" else "")
            exported[name] = (family.type, labels)
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall((DOCS / "observability.md").read_text())
    }
    assert documented == exported


def test_tokens_and_requests_are_judged_by_their_own_deadlines(server):
    def counts() -> tuple[float, ...]:
        tokens, requests = "aegaeon_slo_tokens_total", "aegaeon_slo_requests_total"
        return (
            value(server, tokens, model_name="llama", result="on_time"),
            value(server, tokens, model_name="llama", result="late"),
            value(server, requests, model_name="llama", result="met"),
            value(server, requests, model_name="llama", result="missed"),
        )

    before = counts()
    assert complete(server, "llama").status_code == 200
    hasty = {"x-slo-ttft-ms": "0.001", "x-slo-tpot-ms": "0.001"}
    assert complete(server, "llama", headers=hasty).status_code == 200
    assert [after - b for after, b in zip(counts(), before, strict=True)] == [6, 6, 1, 1]


def test_a_stop_string_is_no_missed_request(server):
    def missed() -> float:
        return value(server, "aegaeon_slo_requests_total", model_name="qwen3", result="missed")

    before = missed()
    text = complete(server, "qwen3", max_tokens=24, temperature=0).json()["choices"][0]["text"]
    stopped = complete(server, "qwen3", max_tokens=24, temperature=0, stop=[text[2:4]])
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    assert missed() == before


def test_the_state_and_the_timeline_show_who_had_the_device(server):
    for name in NAMES:
        complete(server, name)
    state = server.admin("/admin/state")
    for model in state["models"]:
        assert model["usage"]["steps"] >= 6
        assert model["usage"]["step_s"] > 0
        assert model["slo"]["ttft_s"] == 60.0
        assert model["slo"]["recent"]["ttft_s"]["p50"] > 0
    assert state["front"]["open"] == dict.fromkeys(NAMES, 0)
    assert sum(count for _, count in state["switches"]["seconds"]["warm"]) >= 2
    timeline = server.admin("/admin/timeline")
    had = {name for each in timeline["slices"] for name in each["models"]}
    assert had == set(NAMES)
    newest = timeline["slices"][-1]["number"] * timeline["slice_s"]
    assert 0 <= state["now"] - newest < 5.0


def test_an_answer_carries_its_request_id_and_so_does_its_body(server):
    answer = complete(server, "llama", headers={"x-request-id": "job-42"})
    assert answer.headers["x-request-id"] == "job-42"
    assert "job-42" in answer.json()["id"]


def test_top_shows_a_real_server(server):
    def top(option: str) -> str:
        command = [sys.executable, "-m", "aegaeon", "top", option]
        return subprocess.run(
            [*command, "--socket", str(server.admin_socket)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    for name in NAMES:
        complete(server, name)
    assert "on the device: qwen3" in top("--once")
    answer = json.loads(top("--json"))
    assert [model["name"] for model in answer["state"]["models"]] == list(NAMES)
    assert answer["timeline"]["slices"]


def test_the_metrics_of_vllm_that_the_board_shows_are_exported(server):
    complete(server, "llama")
    board = (DOCS / "grafana-dashboard.json").read_text()
    wanted = {name.removesuffix("_bucket") for name in re.findall(r"vllm:\w+", board)}
    assert wanted <= set(families(server))


def test_the_dashboard_is_on_the_admin_listener_alone(server):
    command = [sys.executable, "-m", "aegaeon", "dashboard", "--socket", str(server.admin_socket)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as door:
        assert door.stdout is not None
        try:
            address = door.stdout.readline().strip()
            with httpx.Client(follow_redirects=True, timeout=30) as browser:
                page = browser.get(address)
                assert page.status_code == 200
                assert "EventSource" in page.text
                events = str(page.url.copy_with(path="/admin/events", query=b"with=timeline"))
                with browser.stream("GET", events) as answer:
                    lines = answer.iter_lines()
                    data = next(line for line in lines if line.startswith("data: "))
                    door.send_signal(signal.SIGINT)  # with a browser still there
                    assert list(lines)[-1] == ""
            assert json.loads(data.removeprefix("data: "))["timeline"]["slice_s"] > 0
            assert door.wait(timeout=20) == 0
            assert door.stderr is not None
            assert door.stderr.read() == ""
        finally:
            door.kill()
    assert httpx.get(f"{server.address}/dashboard").status_code == 404


def test_a_trace_of_a_request_reaches_the_collector_with_its_switches(server, collector):
    complete(server, "llama")
    answer = complete(server, "qwen3", headers={"x-request-id": "traced-1"})
    assert answer.status_code == 200
    wait_until(lambda: "traced-1" in collector.requests(), timeout_s=30)
    request = collector.requests()["traced-1"]
    attributes = {each.key: each.value for each in request.attributes}
    assert attributes["gen_ai.request.model"].string_value == "qwen3"
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["aegaeon.switches_to_model"].int_value == 1
    (switch,) = (span for span in collector.spans if span.parent_span_id == request.span_id)
    assert switch.name == "switch to qwen3"
    assert request.start_time_unix_nano <= switch.start_time_unix_nano
    assert switch.end_time_unix_nano <= request.end_time_unix_nano


def test_the_log_has_a_json_line_per_request_and_nothing_of_what_was_said(server):
    secret = "the harbour master's cat"
    answer = complete(server, "llama", prompt=secret, headers={"x-request-id": "logged-1"})
    bad = complete(server, "llama", prompt=secret, max_tokens=-1)
    assert (answer.status_code, bad.status_code) == (200, 400)
    text = (server.admin_socket.parent / "log").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line.get("request_id") == "logged-1")
    assert (line["model"], line["status"], line["route"]) == ("llama", 200, "/v1/completions")
    assert 0 < line["first_byte_s"] <= line["duration_s"]
    assert secret not in text
    assert answer.json()["choices"][0]["text"] not in text


def test_bench_serve_and_the_server_count_the_same(server, tmp_path):
    def on_server(name: str, metric: str, **labels: str) -> float:
        return value(server, metric, model_name=name, **labels)

    before = {name: on_server(name, "aegaeon_slo_tokens_total") for name in NAMES}
    lines = tmp_path / "requests.csv"
    options = ["--rate", "3", "--duration", "3", "--lengths", "24:8", "--csv", str(lines), "--json"]
    objectives = ["--ttft-ms", "60000", "--tpot-ms", "10000"]
    command = [sys.executable, "-m", "aegaeon", "bench", "serve", "--url", server.address]
    done = subprocess.run(
        [*command, *options, *objectives],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    report = json.loads(done.stdout)["models"]
    assert list(report) == [*NAMES, "all"]
    assert report["all"]["completed"] == report["all"]["requests"] > 0
    assert len(lines.read_text().splitlines()) == 1 + report["all"]["requests"]
    for name in NAMES:
        mine = report[name]
        assert mine["tokens"] == 8 * mine["requests"]
        assert on_server(name, "aegaeon_slo_tokens_total") - before[name] == mine["tokens"]
        assert mine["attainment"]["requests_99_percent_on_time"] == 1.0
