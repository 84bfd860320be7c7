"""What a real server tells of itself, and that its documentation says the same."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from e2e_support import KV_MEMORY, MAX_MODEL_LEN, job_for
from prometheus_client.parser import text_string_to_metric_families

from aegaeon.local_server import LocalServer, local_server

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen3")
DOCS = Path(__file__).parent.parent.parent / "docs"
ROW = re.compile(r"^\| `(aegaeon_\w+)` \| (\w+) \| (.*?) \|", re.MULTILINE)


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory) -> Iterator[LocalServer]:
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
                "admin": {"socket": str(folder / "admin.sock")},
            }
        )
    )
    with local_server(pool, log=folder / "log") as running:
        yield running


def complete(server: LocalServer, model: str, **options: Any) -> httpx.Response:
    headers = options.pop("headers", {})
    body = {"model": model, "prompt": "Once upon a time", "ignore_eos": True, **options}
    url = f"{server.address}/v1/completions"
    return httpx.post(url, json={"max_tokens": 6, **body}, headers=headers, timeout=60)


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as door:
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
            assert json.loads(data.removeprefix("data: "))["timeline"]["slice_s"] > 0
        finally:
            door.send_signal(signal.SIGINT)
        assert door.wait(timeout=20) == 0
    assert httpx.get(f"{server.address}/dashboard").status_code == 404
