"""A request's own SLO through a real server, and admission by it."""

import json
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
import yaml
from e2e_support import KV_MEMORY, MAX_MODEL_LEN, job_for

from aegaeon.local_server import LocalServer, local_server

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen3")


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("objectives")
    models = tiny_models(*NAMES)
    pool = folder / "pool.yaml"
    pool.write_text(
        yaml.safe_dump(
            {
                "device": "host",
                "device_memory": job_for(models, {})["device_memory"],
                "defaults": {"kv_memory": KV_MEMORY, "max_model_len": MAX_MODEL_LEN},
                "models": [{"model": path, "name": name} for name, path in models.items()],
                "scheduler": {"policy": "slack", "admission": "deadline"},
                "admin": {"socket": str(folder / "admin.sock")},
            }
        )
    )
    with local_server(pool, log=folder / "log") as running:
        yield running


def complete(server: LocalServer, name: str, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.address}/v1/completions",
        json={"model": name, "prompt": "Once upon a time", "max_tokens": 4},
        headers={key.replace("_", "-"): value for key, value in headers.items()},
        timeout=60,
    )


def test_what_can_be_on_time_is_served_and_what_cannot_is_told_when_to_come_back(server):
    for name in NAMES:
        assert complete(server, name).status_code == 200
    for name in NAMES:
        refused = complete(server, name, x_slo_ttft_ms="0.01")
        assert refused.status_code == 429, refused.text
        assert refused.json()["error"]["code"] == "deadline_cannot_be_met"
        assert int(refused.headers["retry-after"]) >= 1
        patient = complete(server, name, x_slo_ttft_ms="60000", x_slo_tpot_ms="500")
        assert patient.status_code == 200, patient.text
        assert patient.json()["usage"]["completion_tokens"] == 4


def test_the_engine_reads_the_slo_of_a_request():
    """From vLLM's own request object, made by its own request class for the API."""
    program = """
import json
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.v1.request import Request
from aegaeon.vllm_plugin.seams.engine_core import engine_requests

class Scheduler:
    requests = {}

for name, xargs in (
    ("both", {"slo_ttft_ms": 500.0, "slo_tpot_ms": 20.5}), ("none", None),
    ("odd", {"slo_ttft_ms": "soon", "slo_tpot_ms": -1}), ("text", {"slo_ttft_ms": "250"}),
):
    asked = CompletionRequest(model="m", prompt="x", max_tokens=4, vllm_xargs=xargs)
    sampling = asked.to_sampling_params(4, {})
    Scheduler.requests[name] = Request(name, [1, 2], sampling, None)
print(json.dumps({r.id: (r.ttft_ms, r.tpot_ms) for r in engine_requests(Scheduler)}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "both": [500.0, 20.5],
        "none": [None, None],
        "odd": [None, None],
        "text": [250.0, None],
    }
