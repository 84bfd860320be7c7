"""A real `aegaeon serve` process, asked by the official client and by plain HTTP."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from e2e_support import (
    BODY_LIMIT,
    CHAT,
    chat,
    children_of,
    gauge,
    instance_of,
    leftovers,
    start,
    wait_until,
    write_pool,
)

from aegaeon.local_server import LocalServer, local_server

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen3", "gemma")


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    pool = write_pool(folder, tiny_models(*NAMES))
    with local_server(pool, log=folder / "log") as running:
        yield running
    assert running.stop_s < 5.0


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_every_model_answers_the_official_client(client):
    for name in NAMES:
        answer = client.chat.completions.create(**chat(name, max_tokens=8), temperature=0)
        assert answer.model == name
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0


def test_completions_are_served_too(client):
    answer = client.completions.create(model="qwen3", prompt="Once", max_tokens=5, temperature=0)
    assert answer.choices[0].finish_reason == "length"


def test_streams_of_all_models_go_on_side_by_side(server):
    """The chunks of different models really interleave: no stream waits for another's end."""
    journal: list[str] = []

    async def stream(made: openai.AsyncOpenAI, name: str) -> int:
        chunks = 0
        request = chat(name, max_tokens=40, extra_body={"ignore_eos": True})
        async for _ in await made.chat.completions.create(**request, stream=True):
            journal.append(name)
            chunks += 1
        return chunks

    async def run() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none") as made:
            return await asyncio.gather(*(stream(made, name) for name in NAMES * 2))

    assert all(chunks >= 20 for chunks in asyncio.run(run()))
    firsts = {name: journal.index(name) for name in NAMES}
    lasts = {name: len(journal) - 1 - journal[::-1].index(name) for name in NAMES}
    assert max(firsts.values()) < min(lasts.values())


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == list(NAMES)


def test_an_unknown_model_is_a_404_that_names_the_valid_ones(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**chat("gpt-9"))
    assert "llama, qwen3, gemma" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"{", 400, "not valid JSON"),
        (json.dumps(chat("llama", "word " * 2000)).encode(), 400, "maximum"),
        (json.dumps(chat("llama", "x" * BODY_LIMIT)).encode(), 413, "longer than"),
        (json.dumps(chat("llama", max_tokens=-1)).encode(), 400, "max_tokens"),
    ],
    ids=["json", "prompt", "body", "parameter"],
)
def test_a_bad_request_is_refused_clearly_and_the_others_are_served(
    server, client, content, status, says
):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.address}{CHAT}", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert says in response.json()["error"]["message"]
    for name in NAMES:
        assert client.chat.completions.create(**chat(name, max_tokens=2)).choices


def test_a_client_that_disconnects_frees_its_request_and_its_blocks(server):
    request = chat("llama", max_tokens=450, stream=True, ignore_eos=True)
    with httpx.stream("POST", f"{server.address}{CHAT}", json=request) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        assert gauge(server, "vllm:num_requests_running", "llama") == 1
    wait_until(lambda: gauge(server, "vllm:num_requests_running", "llama") == 0)
    wait_until(lambda: gauge(server, "vllm:kv_cache_usage_perc", "llama") == 0)
    tokens = gauge(server, "vllm:generation_tokens_total", "llama")
    time.sleep(0.5)
    assert gauge(server, "vllm:generation_tokens_total", "llama") == tokens


def test_metrics_tell_the_models_apart_and_count_switches(server, client):
    for name in NAMES:
        client.chat.completions.create(**chat(name, max_tokens=2))
    for name in NAMES:
        assert gauge(server, "vllm:generation_tokens_total", name) > 0
    text = httpx.get(f"{server.address}/metrics").text
    series = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("aegaeon_"))
    assert float(series['aegaeon_switches_total{path="warm"}']) > 3
    assert float(series['aegaeon_switch_seconds_count{path="warm",phase="total"}']) > 3
    held = {key: float(value) for key, value in series.items() if "arena_bytes{" in key}
    assert sum(held.values()) == float(series["aegaeon_arena_capacity_bytes"])


def test_the_admin_listener_is_for_this_user_alone_and_tells_the_state(server):
    assert server.admin_socket.stat().st_mode & 0o777 == 0o600
    state = server.admin("/admin/state")
    assert [model["name"] for model in state["models"]] == list(NAMES)
    assert {model["state"] for model in state["models"]} <= {"host", "resident"}
    assert httpx.get(f"{server.address}/admin/state").status_code == 404


# -- the life of the processes -------------------------------------------------------------------


@pytest.mark.parametrize("when", ["starting", "serving"])
def test_ctrl_c_ends_everything_within_5_s(when, tiny_models, tmp_path, tmpdir_of_servers):
    pool = write_pool(tmp_path, tiny_models("llama"))
    before = leftovers(tmpdir_of_servers)
    process = start(pool)
    assert process.stdout is not None
    try:
        if when == "serving":
            address = process.stdout.readline().split()[-1].removesuffix("/v1")
            with httpx.Client() as http:
                request = chat("llama", max_tokens=450, stream=True, ignore_eos=True)
                with http.stream("POST", f"{address}{CHAT}", json=request) as response:
                    next(response.iter_lines())
                    children = children_of(process.pid)
                    stopping = time.monotonic()
                    process.send_signal(signal.SIGINT)
                    process.wait(timeout=10)
        else:
            wait_until(lambda: bool(children_of(process.pid)), timeout_s=20)
            time.sleep(2.0)
            children = children_of(process.pid)
            stopping = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=10)
        assert time.monotonic() - stopping < 5.0
        assert process.returncode == 0
        assert children
        wait_until(lambda: not any(child.is_running() for child in children))
        wait_until(lambda: leftovers(tmpdir_of_servers) <= before)
        assert not (tmp_path / "admin.sock").exists()
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


ASK_FOR_METRICS = """
import sys, httpx
with httpx.Client() as client:
    while True:
        client.get(sys.argv[1])
"""


def test_a_killed_launcher_takes_the_instance_with_it_also_one_that_stands_still(
    tiny_models, tmp_path, tmpdir_of_servers
):
    process = start(write_pool(tmp_path, tiny_models("llama")))
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1].removesuffix("/v1")
    children = children_of(process.pid)
    asking = subprocess.Popen(  # so that it is killed with a question open
        [sys.executable, "-c", ASK_FOR_METRICS, f"{address}/metrics"], stderr=subprocess.DEVNULL
    )
    time.sleep(1.0)
    instance_of(process.pid).suspend()
    process.kill()
    process.wait()
    process.stdout.close()
    asking.wait(timeout=10)
    assert children
    wait_until(lambda: not any(child.is_running() for child in children))
    assert not list(tmpdir_of_servers.glob("aegaeon-*"))


def test_when_the_instance_dies_during_the_start_the_server_ends(
    tiny_models, tmp_path, tmpdir_of_servers
):
    process = start(write_pool(tmp_path, tiny_models("llama")))
    assert process.stdout is not None
    wait_until(lambda: bool(children_of(process.pid)), timeout_s=20)
    time.sleep(2.0)
    for child in children_of(process.pid):
        child.kill()
    assert process.wait(timeout=20) == 1
    process.stdout.close()
    assert not list(tmpdir_of_servers.glob("aegaeon-*"))


# -- pools that cannot be served -----------------------------------------------------------------


def serve_to_the_end(pool: Path, *, port: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aegaeon", "serve", str(pool), "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(pool: Path) -> str:
    done = serve_to_the_end(pool)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(tiny_models, tmp_path):
    message = refused(write_pool(tmp_path, tiny_models("llama"), device_memory="8MiB"))
    assert "'llama' needs" in message
    assert "16 MiB kv_memory" in message
    assert "device_memory is 8 MiB" in message


def test_host_images_that_cannot_fit_are_refused_with_the_numbers(tiny_models, tmp_path):
    message = refused(write_pool(tmp_path, tiny_models("llama", "qwen3"), host_memory="15MiB"))
    assert "host images of all models need 14 MiB, and swapped KV needs 2 MiB" in message
    assert "host_memory is 15 MiB" in message


@pytest.mark.parametrize("damage", ["truncated", "header", "missing"])
def test_a_damaged_safetensors_file_is_refused_by_name(damage, tiny_models, tmp_path):
    source = Path(tiny_models("llama")["llama"])
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    pool = write_pool(tmp_path, {"damaged": str(copy)})
    weights = copy / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "header":
        content = bytearray(weights.read_bytes())
        content[20] ^= 0xFF
        weights.write_bytes(content)
    else:
        weights.unlink()
    message = refused(pool)
    assert "damaged" in message
    assert ("safetensors weights" if damage == "missing" else "model.safetensors") in message


@pytest.mark.parametrize(
    ("option", "status", "says"),
    [
        ({"max_num_sq": 4}, 2, "unrecognized arguments: --max-num-sq"),
        ({"max_num_seq": 4}, 2, "unrecognized arguments: --max-num-seq"),
        ({"tensor_parallel_size": 2}, 2, "several devices are not hosted yet"),
        ({"speculative_config.method": "ngram"}, 2, "expected the plain name of an option"),
    ],
    ids=["unknown", "abbreviated", "refused", "dotted"],
)
def test_a_model_that_vllm_refuses_is_named_also_when_it_is_not_the_first(
    option, status, says, tiny_models, tmp_path
):
    models = tiny_models("llama", "qwen3")
    pool = yaml.safe_load(write_pool(tmp_path, models).read_text())
    pool["models"][1].update(name="damaged", vllm=option)
    file = tmp_path / "damaged.yaml"
    file.write_text(yaml.safe_dump(pool))
    done = serve_to_the_end(file)
    assert done.returncode == status, done.stderr[-3000:]
    assert "damaged" in done.stderr
    assert says in done.stderr


def test_a_model_that_cannot_be_loaded_is_out_of_service_and_the_others_are_served(
    tiny_models, tmp_path
):
    pool = yaml.safe_load(write_pool(tmp_path, tiny_models("llama", "qwen3")).read_text())
    pool["models"][0].update(name="damaged", vllm={"block_size": 1 << 20})
    file = tmp_path / "damaged.yaml"
    file.write_text(yaml.safe_dump(pool))
    with local_server(file, log=tmp_path / "log") as running:
        refused = httpx.post(f"{running.address}{CHAT}", json=chat("damaged"), timeout=30)
        served = httpx.post(
            f"{running.address}{CHAT}", json=chat("qwen3", max_tokens=2), timeout=60
        )
        listed = httpx.get(f"{running.address}/v1/models").json()["data"]
        failures = running.admin("/admin/state")["failures"]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_out_of_service"
    assert served.status_code == 200
    assert {card["id"]: card["state"] for card in listed}["damaged"] == "failed"
    assert list(failures) == ["damaged"]
    assert "damaged is out of service" in (tmp_path / "log").read_text()


def test_a_pool_of_which_no_model_can_be_loaded_is_refused(tiny_models, tmp_path):
    pool = yaml.safe_load(write_pool(tmp_path, tiny_models("llama")).read_text())
    pool["models"][0].update(name="damaged", vllm={"block_size": 1 << 20})
    file = tmp_path / "damaged.yaml"
    file.write_text(yaml.safe_dump(pool))
    done = serve_to_the_end(file)
    assert done.returncode == 1
    assert "damaged' cannot be loaded" in done.stderr


def test_the_admin_socket_of_a_killed_server_is_taken_over_and_that_of_a_running_one_is_not(
    server, tiny_models, tmp_path
):
    admin = {"socket": str(server.admin_socket)}
    message = refused(write_pool(tmp_path, tiny_models("llama"), admin=admin))
    assert f"cannot create the admin socket {server.admin_socket}" in message
    assert server.admin("/admin/state")["models"]
    abandoned = tmp_path / "abandoned.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(abandoned))
    process = start(write_pool(tmp_path, tiny_models("llama"), admin={"socket": str(abandoned)}))
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("aegaeon serves")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        process.stdout.close()
    assert not abandoned.exists()


def test_a_port_in_use_is_refused_before_anything_is_loaded(tiny_models, tmp_path):
    pool = write_pool(tmp_path, tiny_models("llama"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = serve_to_the_end(pool, port=port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
