"""`aegaeon ps | load | unload | pin | unpin` and the admin listener, against a real server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from e2e_support import KV_MEMORY, MAX_MODEL_LEN, job_for

from aegaeon.local_server import LocalServer, local_server

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen3")


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("orders")
    models = tiny_models(*NAMES)
    pool = folder / "pool.yaml"
    pool.write_text(
        yaml.safe_dump(
            {
                "device": "host",
                "device_memory": job_for(models, {})["device_memory"],
                "defaults": {"kv_memory": KV_MEMORY, "max_model_len": MAX_MODEL_LEN},
                "models": [{"model": path, "name": name} for name, path in models.items()],
                "admin": {"socket": str(folder / "admin.sock")},
            }
        )
    )
    with local_server(pool, log=folder / "log") as running:
        yield running


def aegaeon(server: LocalServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aegaeon", *arguments, "--socket", str(server.admin_socket)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def states(server: LocalServer) -> dict[str, str]:
    done = aegaeon(server, "ps", "--json")
    assert done.returncode == 0, done.stderr
    return {model["name"]: model["state"] for model in json.loads(done.stdout)["models"]}


def test_models_come_and_go_by_order(server):
    for name, other in (NAMES, NAMES[::-1]):
        done = aegaeon(server, "load", name)
        assert (done.returncode, done.stdout) == (0, f"{name}: resident\n"), done.stderr
        assert states(server) == {name: "resident", other: "host"}
    done = aegaeon(server, "unload", "qwen3")
    assert (done.returncode, done.stdout) == (0, "qwen3: host\n"), done.stderr
    assert set(states(server).values()) == {"host"}
    body: dict[str, Any] = {"model": "llama", "prompt": "Once", "max_tokens": 3}
    assert httpx.post(f"{server.address}/v1/completions", json=body, timeout=60).status_code == 200
    assert states(server)["llama"] == "resident"


def test_people_read_a_table(server):
    done = aegaeon(server, "ps")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in NAMES)


def test_an_order_that_cannot_be_followed_says_why(server):
    done = aegaeon(server, "load", "nobody")
    assert done.returncode != 0
    assert "nobody" in done.stderr
    assert "llama" in done.stderr  # the names there are
    # Pinned, one model would keep the other from ever running: the device holds one of them.
    before = states(server)
    done = aegaeon(server, "pin", "llama")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert states(server) == before


def test_without_a_server_it_says_so(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "aegaeon", "ps", "--socket", str(tmp_path / "none.sock")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "none.sock" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_of_models_tells_their_states(server):
    listed = httpx.get(f"{server.address}/v1/models").json()["data"]
    assert {model["id"] for model in listed} == set(NAMES)
    by_state = states(server)
    assert {model["id"]: model["state"] for model in listed} == by_state


def test_events_are_streamed(server):
    transport = httpx.HTTPTransport(uds=str(server.admin_socket))
    with (
        httpx.Client(transport=transport, base_url="http://admin", timeout=30) as client,
        client.stream("GET", "/admin/events") as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        data = next(line for line in lines if line.startswith("data:"))
        assert json.loads(data.removeprefix("data:"))
