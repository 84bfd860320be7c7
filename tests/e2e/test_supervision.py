"""The instance of a real server is killed and stopped; the front stays, and a new one comes."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from e2e_support import CHAT, chat, children_of, gauge, instance_of, wait_until, write_pool

from aegaeon.local_server import LocalServer, local_server
from aegaeon.server.admin_client import AdminClient

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen3")
STALLED_AFTER_S = 2.0


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("supervised")
    with pytest.MonkeyPatch.context() as patch:
        # A short path: a unix socket has little room.
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t")))
        pool = write_pool(
            folder,
            tiny_models(*NAMES),
            device_memory="128MiB",
            supervision={"max_restarts": 1, "stalled_after": STALLED_AFTER_S},
        )
        with local_server(pool, log=folder / "log") as running:
            yield running


def tokens_of(server: LocalServer, name: str) -> str:
    request = chat(name, "Tell me more.", max_tokens=12, temperature=0, ignore_eos=True)
    answer = httpx.post(f"{server.address}{CHAT}", json=request, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def health(server: LocalServer) -> httpx.Response:
    return httpx.get(f"{server.address}/health", timeout=5)


def test_an_edited_pool_file_is_followed_and_a_bad_one_is_not(server):
    file = server.admin_socket.parent / "pool.yaml"
    log = server.admin_socket.parent / "log"
    pool = yaml.safe_load(file.read_text())
    pool["models"][0] |= {"aliases": ["nick"], "priority": 3, "slo": {"ttft_ms": 1234}}
    pool["server"]["max_n"] = 1
    pool["scheduler"]["quantum"] = 3
    file.write_text(yaml.safe_dump(pool))
    wait_until(lambda: "quantum" in log.read_text(), timeout_s=20)
    text = log.read_text()
    assert "models[llama].aliases: () -> ('nick',)" in text
    assert "scheduler.quantum: 2 -> 3: needs a restart of the server" in text
    assert tokens_of(server, "nick") == tokens_of(server, "llama")
    listed = httpx.get(f"{server.address}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["llama", "nick", "qwen3"]
    refused = httpx.post(f"{server.address}{CHAT}", json=chat("nick", n=2))
    assert refused.json()["error"]["code"] == "too_many_answers"
    slo = {model["name"]: model["slo"] for model in server.admin("/admin/state")["models"]}
    assert slo["llama"]["ttft_s"] == 1.234

    file.write_text("models: []")
    wait_until(lambda: "all stays as it was" in log.read_text(), timeout_s=20)
    assert tokens_of(server, "nick")


def test_when_the_instance_is_killed_requests_end_within_2_s_and_a_new_one_serves_the_same(server):
    before = {name: tokens_of(server, name) for name in NAMES}
    AdminClient(server.admin_socket).order("pin", "qwen3")
    old = instance_of(server.process.pid)
    family = [old, *old.children(recursive=True)]
    plain: list[httpx.Response] = []
    long = chat("qwen3", max_tokens=450, ignore_eos=True)

    def ask() -> None:
        plain.append(httpx.post(f"{server.address}{CHAT}", json=long, timeout=60))

    asking = threading.Thread(target=ask)
    with httpx.stream(
        "POST", f"{server.address}{CHAT}", json={**long, "model": "llama", "stream": True}
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        asking.start()
        wait_until(lambda: running(server) == {"llama": 1, "qwen3": 1}, timeout_s=20)
        old.kill()
        killed_s = time.monotonic()
        rest = "\n".join(lines)
        asking.join()
        assert time.monotonic() - killed_s < 2.0
    assert '"code": "instance_restarting"' in rest
    assert "ended by signal 9" in rest
    assert plain[0].status_code == 503
    assert plain[0].json()["error"]["code"] == "instance_restarting"

    down = health(server)
    assert down.status_code == 503
    assert down.json()["error"]["code"] == "instance_restarting"
    refused = httpx.post(f"{server.address}{CHAT}", json=long)
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
    assert len(httpx.get(f"{server.address}/v1/models").json()["data"]) == 3
    assert instance_series(server) == {"up": 0.0, "restarts_total": 1.0}

    wait_until(lambda: health(server).status_code == 200, timeout_s=120)
    assert not any(process.is_running() for process in family)
    assert gauge(server, "vllm:num_requests_running", "llama") == 0
    assert {name: tokens_of(server, name) for name in NAMES} == before
    assert tokens_of(server, "nick") == before["llama"]  # what was edited holds on
    pinned = {model["name"]: model["pinned"] for model in server.admin("/admin/state")["models"]}
    assert pinned == {"llama": False, "qwen3": True}
    assert instance_series(server) == {"up": 1.0, "restarts_total": 1.0}


def instance_series(server: LocalServer) -> dict[str, float]:
    prefix = "aegaeon_instance_"
    lines = httpx.get(f"{server.address}/metrics").text.splitlines()
    found = (line.removeprefix(prefix).split() for line in lines if line.startswith(prefix))
    return {name: float(value) for name, value in found}


def running(server: LocalServer) -> dict[str, int]:
    state = server.admin("/admin/state")
    return {model["name"]: model["running"] for model in state["models"]}


def test_a_stopped_instance_turns_health_to_503_and_a_continued_one_to_200(server):
    instance = instance_of(server.process.pid)
    instance.suspend()
    stopped_s = time.monotonic()
    wait_until(lambda: health(server).status_code == 503, timeout_s=10)
    assert time.monotonic() - stopped_s >= STALLED_AFTER_S
    assert "does not answer" in health(server).json()["error"]["message"]
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(tokens_of(server, "llama")))
    asking.start()
    time.sleep(0.5)
    assert answers == []  # held, not refused
    instance.resume()
    wait_until(lambda: health(server).status_code == 200, timeout_s=10)
    asking.join(timeout=60)
    assert len(answers) == 1


def test_beyond_the_limit_of_restarts_the_server_ends_and_leaves_nothing(server):
    runtime = instance_of(server.process.pid)
    children = children_of(server.process.pid)
    runtime.kill()
    assert server.process.wait(timeout=20) == 1
    assert not any(child.is_running() for child in children)
    assert not server.admin_socket.exists()
    log = (server.admin_socket.parent / "log").read_text()
    assert "supervision.max_restarts: giving up" in log
