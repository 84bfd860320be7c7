"""The instance dies or stops in the middle of things, at points with names.

A few of them here; all of them, again and again, with the marker `soak`, where AEGAEON_TEST_SCALE
says how often.
"""

import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from e2e_support import (
    CHAT,
    PROGRAMS,
    chat,
    children_of,
    instance_of,
    leftovers,
    wait_until,
    write_pool,
)

from aegaeon.local_server import LocalServer, local_server

pytestmark = pytest.mark.vllm

SCALE = int(os.environ.get("AEGAEON_TEST_SCALE", "1"))
NAMES = ("llama", "qwen3")
STALLED_AFTER_S, RESTART_AFTER_S, START_TIMEOUT_S = 1.0, 6.0, 180.0


def _points() -> list[str]:
    spec = importlib.util.spec_from_file_location("chaos", PROGRAMS / "chaos/sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.POINTS)


POINTS = _points()
# More of SIGKILL is in test_supervision.py.
IN_CI = [("switch before load", "SIGSTOP")]


@dataclass
class Chaotic:
    """A server whose instances do what a file says."""

    running: LocalServer
    file: Path
    expected: dict[str, str] = field(default_factory=dict)

    def arm(self, point: str, signal_name: str) -> None:
        self.taken.unlink(missing_ok=True)
        armed = self.file.with_suffix(".new")
        armed.write_text(f"{point} {signal_name}")
        armed.rename(self.file)

    @property
    def taken(self) -> Path:
        return self.file.with_name(f"{self.file.name}.taken")


@pytest.fixture(scope="module")
def chaotic(tiny_models, tmp_path_factory) -> Iterator[Chaotic]:
    folder, temporary = tmp_path_factory.mktemp("chaos"), tmp_path_factory.mktemp("t")
    before = leftovers(temporary)
    pool = write_pool(
        folder,
        tiny_models(*NAMES),
        supervision={
            "stalled_after": STALLED_AFTER_S,
            "restart_after": RESTART_AFTER_S,
            "max_restarts": 10_000,
            "start_timeout": START_TIMEOUT_S,
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("AEGAEON_CHAOS_FILE", str(folder / "armed"))
        path = [str(PROGRAMS / "chaos"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", ":".join(each for each in path if each))
        with local_server(pool, log=folder / "log") as running:
            server = Chaotic(running, folder / "armed")
            for name in NAMES:
                server.expected[name] = asked(server, name)["text"]
            yield server
    wait_until(lambda: leftovers(temporary) <= before)


def asked(server: Chaotic, name: str) -> dict[str, Any]:
    """How a request ended: its text, or its error; and when."""
    request = chat(name, "Tell me more.", max_tokens=30, temperature=0, ignore_eos=True)
    try:
        answer = httpx.post(f"{server.running.address}{CHAT}", json=request, timeout=100)
    except httpx.HTTPError as error:
        return {"failed": repr(error), "at": time.monotonic()}
    body = answer.json()
    if answer.status_code != 200:
        return {"error": body["error"]["code"], "at": time.monotonic()}
    return {"text": body["choices"][0]["message"]["content"], "at": time.monotonic()}


def is_healthy(server: Chaotic) -> bool:
    return httpx.get(f"{server.running.address}/health", timeout=5).status_code == 200


def strike(server: Chaotic, point: str, signal_name: str) -> None:
    """Let it happen under load, and check all that has to hold afterwards."""
    wait_until(lambda: is_healthy(server), timeout_s=300)  # whatever the one before has left
    old = instance_of(server.running.process.pid)
    family = [old, *old.children(recursive=True)]
    server.arm(point, signal_name)
    ends: list[tuple[str, dict[str, Any]]] = []
    asking = [
        threading.Thread(target=lambda name=name: ends.append((name, asked(server, name))))
        for name in NAMES * 2
    ]
    for thread in asking:
        thread.start()
    if point.startswith("start"):
        old.kill()
    elif point == "question":
        httpx.get(f"{server.running.address}/metrics", timeout=100)
    wait_until(server.taken.exists, timeout_s=300)
    struck = time.monotonic()
    for thread in asking:
        thread.join(timeout=120)
    patience_s = 2.0 if signal_name == "SIGKILL" else RESTART_AFTER_S + 4.0
    for name, end in ends:
        assert end["at"] - struck < patience_s, (point, end)
        if "text" in end:
            assert end["text"] == server.expected[name], point
        else:
            assert end.get("error") == "instance_restarting", (point, end)
    assert len(ends) == len(asking)

    wait_until(lambda: is_healthy(server), timeout_s=300 + START_TIMEOUT_S)
    wait_until(lambda: not any(process.is_running() for process in family))
    assert instance_of(server.running.process.pid) != old
    for name in NAMES:
        assert asked(server, name)["text"] == server.expected[name], point


@pytest.mark.parametrize(("point", "signal_name"), IN_CI)
def test_whatever_happens_to_the_instance_requests_end_and_service_comes_back(
    chaotic, point, signal_name
):
    strike(chaotic, point, signal_name)


@pytest.mark.soak
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", range(SCALE))
def test_at_every_point_requests_end_and_service_comes_back(chaotic, point, signal_name, number):
    strike(chaotic, point, signal_name)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("switch")])
def test_a_server_killed_while_its_instance_stands_still_leaves_nothing(
    point, tiny_models, tmp_path, tmpdir_of_servers, monkeypatch
):
    before = leftovers(tmpdir_of_servers)
    monkeypatch.setenv("AEGAEON_CHAOS_FILE", str(tmp_path / "armed"))
    path = f"{PROGRAMS / 'chaos'}:{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path.removesuffix(":"))
    with local_server(write_pool(tmp_path, tiny_models(*NAMES)), log=tmp_path / "log") as running:
        server = Chaotic(running, tmp_path / "armed")
        children = children_of(running.process.pid)
        server.arm(point, "SIGSTOP")
        asking = [threading.Thread(target=asked, args=(server, name)) for name in NAMES]
        for thread in asking:
            thread.start()
        wait_until(server.taken.exists, timeout_s=60)
        running.process.kill()
        running.process.wait()
        for thread in asking:
            thread.join()
        wait_until(lambda: not any(alive(child) for child in children))
        wait_until(lambda: leftovers(tmpdir_of_servers) <= before)


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
