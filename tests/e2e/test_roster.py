"""`aegaeon add` and `remove`: models come to a running server and go, while others answer."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from e2e_support import KV_MEMORY, MAX_MODEL_LEN, job_for, requests_for

from aegaeon.local_server import LocalServer, local_server

pytestmark = pytest.mark.vllm

FIRST, GUEST = "llama", "qwen3"


@pytest.fixture(scope="module")
def models(tiny_models) -> dict[str, str]:
    return tiny_models(FIRST, GUEST)


@pytest.fixture(scope="module")
def expected(models, plain_vllm) -> dict[str, list[list[int]]]:
    return plain_vllm(models, requests_for(list(models), per_model=2))


@pytest.fixture(scope="module")
def pool_file(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("roster")
    path: Path = folder / "pool.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "device": "host",
                "device_memory": job_for(models, {})["device_memory"],
                "defaults": {"kv_memory": KV_MEMORY, "max_model_len": MAX_MODEL_LEN},
                "models": [{"model": models[FIRST], "name": FIRST}],
                "admin": {"socket": str(folder / "admin.sock")},
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def server(pool_file) -> Iterator[LocalServer]:
    with local_server(pool_file, log=pool_file.with_name("log")) as running:
        yield running


def aegaeon(server: LocalServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aegaeon", *arguments, "--socket", str(server.admin_socket)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def add_guest(server: LocalServer, models: dict[str, str]) -> None:
    done = aegaeon(server, "add", models[GUEST], "--name", GUEST, "--set", "aliases=[guest]")
    assert (done.returncode, done.stdout) == (0, f"{GUEST}: resident\n"), done.stderr


def ask(server: LocalServer, name: str, number: int = 0) -> httpx.Response:
    request = requests_for([name], per_model=2)[name][number]
    body = {"model": name, "prompt": request["prompt"], "return_token_ids": True}
    return httpx.post(
        f"{server.address}/v1/completions", json=body | request["sampling"], timeout=120
    )


def token_ids(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def state(server: LocalServer) -> dict[str, Any]:
    done = aegaeon(server, "ps", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_model_comes_answers_exactly_and_goes_without_a_trace(server, models, expected):
    assert ask(server, GUEST).status_code == 404
    held = []
    for _ in range(2):
        add_guest(server, models)
        for name in (FIRST, GUEST, FIRST):
            for number in range(2):
                assert token_ids(ask(server, name, number)) == expected[name][number]
        assert ask(server, "guest").status_code == 200  # the alias
        listed = httpx.get(f"{server.address}/v1/models").json()["data"]
        assert {card["id"] for card in listed} == {FIRST, GUEST, "guest"}
        assert f'model_name="{GUEST}"' in httpx.get(f"{server.address}/metrics").text
        done = aegaeon(server, "remove", GUEST)
        assert (done.returncode, done.stdout) == (0, f"{GUEST}: removed\n"), done.stderr
        refusal = ask(server, GUEST)
        assert refusal.status_code == 404
        assert FIRST in refusal.json()["error"]["message"]
        after = state(server)
        assert [model["name"] for model in after["models"]] == [FIRST]
        held.append(after["arena"]["held"])
        own = httpx.get(f"{server.address}/metrics").text
        assert not [line for line in own.splitlines() if "aegaeon" in line and GUEST in line]
    assert GUEST not in {part["owner"] for part in held[0]}
    assert held[0] == held[1]


def test_a_request_that_is_open_is_waited_for_or_keeps_its_model(server, models):
    add_guest(server, models)
    body = {"model": GUEST, "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    url = f"{server.address}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        done = aegaeon(server, "remove", GUEST, "--timeout", "0")
        assert done.returncode == 1
        assert "open requests" in done.stderr
        assert ask(server, GUEST).status_code == 200
        options = ("--socket", str(server.admin_socket))
        going = subprocess.Popen([sys.executable, "-m", "aegaeon", "remove", GUEST, *options])
        rest = [line for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
        usage = json.loads(rest[-2].removeprefix("data: "))["usage"]
        assert usage["completion_tokens"] == 400
    assert going.wait(timeout=60) == 0
    assert ask(server, GUEST).status_code == 404


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("{guest}", "--name", FIRST), "already taken"),
        (("/nowhere/at-all", "--name", "x"), "/nowhere/at-all"),
        (("{guest}", "--set", "kv_memory=100TiB"), "kv_memory"),
        (("{guest}", "--set", "no_such_key=1"), "no_such_key"),
        (("{guest}", "--set", "max_model_len=10000000"), "max_model_len"),
        (("{guest}", "--set", "nonsense"), "KEY=VALUE"),
    ],
)
def test_what_cannot_be_added_is_refused_and_changes_nothing(server, models, arguments, reason):
    done = aegaeon(server, "add", *(each.format(guest=models[GUEST]) for each in arguments))
    assert done.returncode != 0
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert ask(server, FIRST).status_code == 200
    after = state(server)
    assert [model["name"] for model in after["models"]] == [FIRST]
    assert {part["owner"] for part in after["arena"]["held"]} == {FIRST}


def test_what_is_not_there_or_the_last_is_not_removed(server):
    done = aegaeon(server, "remove", "nobody")
    assert done.returncode == 1
    assert "nobody" in done.stderr
    done = aegaeon(server, "remove", FIRST)
    assert done.returncode == 1
    assert "only model" in done.stderr
    assert ask(server, FIRST).status_code == 200


def test_an_instance_that_is_started_anew_has_what_was_added(server, models, expected):
    add_guest(server, models)
    instance = next(
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "aegaeon.vllm_plugin.instance" in child.cmdline()
    )
    instance.kill()
    ends = time.monotonic() + 90
    while (answer := ask(server, GUEST)).status_code != 200 and time.monotonic() < ends:
        time.sleep(0.2)
    assert token_ids(answer) == expected[GUEST][0]
    assert token_ids(ask(server, FIRST)) == expected[FIRST][0]
    assert aegaeon(server, "remove", GUEST).returncode == 0


def test_models_come_and_go_with_the_pool_file(server, models, expected, pool_file):
    original = pool_file.read_text()
    edited = yaml.safe_load(original)
    edited["models"].append({"model": models[GUEST], "name": GUEST})
    for text, names in ((yaml.safe_dump(edited), {FIRST, GUEST}), (original, {FIRST})):
        pool_file.write_text(text)
        ends = time.monotonic() + 90
        while served_names(server) != names and time.monotonic() < ends:
            time.sleep(0.2)
        assert served_names(server) == names
        for name in names:
            assert token_ids(ask(server, name)) == expected[name][0]


def test_an_idle_model_leaves_the_device_after_its_keep_alive_and_comes_back(server, models):
    done = aegaeon(server, "add", models[GUEST], "--name", GUEST, "--set", "keep_alive=1s")
    assert done.returncode == 0, done.stderr
    ends = time.monotonic() + 60
    while state_of(server, GUEST) != "host" and time.monotonic() < ends:
        time.sleep(0.2)
    assert state_of(server, GUEST) == "host"
    assert ask(server, GUEST).status_code == 200
    assert aegaeon(server, "remove", GUEST).returncode == 0


def state_of(server: LocalServer, name: str) -> str:
    return str({model["name"]: model["state"] for model in state(server)["models"]}[name])


def served_names(server: LocalServer) -> set[str]:
    return {card["id"] for card in httpx.get(f"{server.address}/v1/models").json()["data"]}
