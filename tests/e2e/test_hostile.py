"""Who may do what, and clients that mean harm, against a real server with keys.

Bounded here; AEGAEON_TEST_SCALE multiplies the sizes for a long run.
"""

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from e2e_support import BODY_LIMIT, CHAT, chat, instance_of, write_pool
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from aegaeon.local_server import LocalServer, local_server
from aegaeon.server.admin import admin_app
from aegaeon.server.app import MODEL_ROUTES
from aegaeon.server.auth import add_key

pytestmark = pytest.mark.vllm

SCALE = int(os.environ.get("AEGAEON_TEST_SCALE", "1"))
NAMES = ("llama", "qwen3")
MIB = 1 << 20

# What the router answers itself: path -> whether it asks for a key.
OWN_ROUTES = {
    "/health": False,
    "/ready": False,
    "/metrics": True,
    "/v1/models": True,
    "/v1/models/llama": True,
}
# What vLLM's applications have and nobody reaches: control, state of requests that another client
# may have made, batches that count as one request, rendering, documentation, aliases of routes.
HIDDEN = {
    *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/version", "/load", "/ping"),
    *("/invocations", "/kv_event_sources", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
    *("/inference/v1/generate", "/inference/v1/abort_requests", "/generative_scoring"),
    *("/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/completions/render"),
    *("/v1/chat/completions/derender", "/v1/completions/derender", "/v1/messages/render"),
    *("/v1/responses/render", "/v1/responses/{response_id}", "/v1/systemone"),
    *("/v1/responses/{response_id}/cancel", "/v1/realtime"),
    *("/v1/audio/transcriptions", "/v1/audio/translations"),
}


@dataclass(frozen=True)
class Guarded:
    """A server, and who may call it."""

    running: LocalServer
    user: str
    admin: str
    admin_port: int

    @property
    def user_header(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.user}"}

    @property
    def port(self) -> int:
        return int(self.running.address.rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    user, admin = add_key(folder / "users", "alice"), add_key(folder / "admins", "root")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        admin_port = free.getsockname()[1]
    pool = write_pool(
        folder,
        tiny_models(*NAMES),
        defaults={"kv_memory": 16 << 20, "max_model_len": 128},
        server={"max_body_bytes": BODY_LIMIT, "api_keys_file": "users"},
        admin={
            "socket": str(folder / "admin.sock"),
            "port": admin_port,
            "keys_file": "admins",
        },
    )
    with local_server(pool, log=folder / "log") as running:
        yield Guarded(running, user, admin, admin_port)


@pytest.fixture(scope="module")
def vllm_application(tiny_models, program) -> dict[str, Any]:
    return program("routes", {"model": tiny_models("llama")["llama"]})


# -- who may do what -----------------------------------------------------------------------------


def callers(server: Guarded) -> dict[str, dict[str, str]]:
    keys = {"no key": None, "wrong key": "ak-wrong", "user": server.user, "admin": server.admin}
    return {
        name: {} if key is None else {"authorization": f"Bearer {key}"}
        for name, key in keys.items()
    }


def status(client: httpx.Client, method: str, path: str, header: dict[str, str]) -> int:
    """Of the answer, whose body may have no end."""
    with client.stream(method, path, headers=header, json={}) as response:
        return response.status_code


def test_every_route_of_vllm_is_dispatched_or_hidden_on_purpose(vllm_application):
    """A new one of a new vLLM has to be looked at."""
    found = {route[0] for route in vllm_application["routes"]}
    assert found - MODEL_ROUTES - OWN_ROUTES.keys() - HIDDEN == set()
    assert found & MODEL_ROUTES >= {CHAT, "/v1/completions", "/v1/responses", "/v1/messages"}


def test_the_public_listener_lets_in_users_and_shows_them_no_control(server):
    admin_paths = {
        route.path.replace("{name:path}", "llama") for route in admin_app(lambda: None).routes
    }
    hidden = {path.replace("{response_id}", "resp_1") for path in HIDDEN} | admin_paths
    wrong: list[Any] = []
    with httpx.Client(base_url=server.running.address, timeout=20) as client:
        for caller, header in callers(server).items():
            for path in sorted(MODEL_ROUTES | OWN_ROUTES.keys() | hidden):
                for method in ("GET", "POST"):
                    if not OWN_ROUTES.get(path, True) and method == "GET":
                        expected = {200}
                    elif caller != "user" and OWN_ROUTES.get(path, True):
                        expected = {401}
                    elif path in OWN_ROUTES:
                        expected = {200} if method == "GET" else {401, 404, 405}
                    elif path in MODEL_ROUTES:
                        expected = {400} if method == "POST" else {405}
                    else:
                        expected = {404}
                    got = status(client, method, path, header)
                    if got not in expected:
                        wrong.append((caller, method, path, got, expected))
    assert wrong == []


def test_the_admin_port_lets_in_its_own_keys_and_the_socket_its_own_user(server):
    routes = [
        (method, route.path.replace("{name:path}", "no-such-model"))
        for route in admin_app(lambda: None).routes
        for method in sorted(route.methods)
    ]
    assert len(routes) > 10
    # Asked for a model that is not there, so that nothing is done to those that are.
    routes = [
        (method, f"{path}?model=no-such-model" if path in ("/sleep", "/wake_up") else path)
        for method, path in routes
    ]
    wrong: list[Any] = []
    port = httpx.Client(base_url=f"http://127.0.0.1:{server.admin_port}", timeout=20)
    transport = httpx.HTTPTransport(uds=str(server.running.admin_socket))
    peer = httpx.Client(base_url="http://admin", transport=transport, timeout=20)
    with port, peer:
        for method, path in routes:
            served = status(peer, method, path, {})
            if served not in (200, 400, 404):
                wrong.append(("unix peer", method, path, served))
            for caller, header in callers(server).items():
                got = status(port, method, path, header)
                if got != (served if caller == "admin" else 401):
                    wrong.append((caller, method, path, got))
    assert wrong == []


# -- clients that mean harm ----------------------------------------------------------------------


def stream_of(server: Guarded) -> str:
    request = {"model": "llama", "prompt": "Once upon a time", "max_tokens": 40, "stream": True}
    request |= {"temperature": 0, "ignore_eos": True}
    text = ""
    with httpx.stream(
        *("POST", f"{server.running.address}/v1/completions"),
        json=request,
        headers=server.user_header,
        timeout=120,
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


@contextmanager
def canary(server: Guarded) -> Iterator[None]:
    """While the block runs, streams of an innocent client go on, and every one is exact."""
    expected = stream_of(server)
    seen: list[str] = []
    over = threading.Event()

    def sing() -> None:
        while not over.is_set():
            seen.append(stream_of(server))

    singing = threading.Thread(target=sing)
    singing.start()
    process = psutil.Process(server.running.process.pid)
    before, instance = process.memory_info().rss, instance_of(process.pid)
    try:
        yield
    finally:
        over.set()
        singing.join(timeout=120)
    assert seen
    assert set(seen) == {expected}
    assert instance_of(process.pid) == instance
    assert process.memory_info().rss - before < 200 * MIB
    assert httpx.get(f"{server.running.address}/health").status_code == 200


def post(server: Guarded, content: bytes, path: str = CHAT, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json", **server.user_header, **headers}
    return httpx.post(
        f"{server.running.address}{path}", content=content, headers=headers, timeout=60
    )


def test_hostile_requests_get_the_right_status_and_the_canary_sings_on(server):
    deep = b'{"model": "llama", "messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    deep_object = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    huge = json.dumps(chat("llama", "x" * BODY_LIMIT)).encode()
    cases: list[tuple[int, Callable[[], httpx.Response]]] = [
        (400, lambda: post(server, deep)),
        (400, lambda: post(server, deep_object)),
        (413, lambda: post(server, huge)),
        (400, lambda: post(server, b"\xff\xfe\x00" * 1000)),
        (400, lambda: post(server, json.dumps(chat("llama", n=10**6)).encode())),
        (431, lambda: post(server, b"{}", x="y" * 20_000)),
        (431, lambda: post(server, b"{}", **{f"x-{i}": "y" * 20 for i in range(1000)})),
    ]
    names = ["../../etc/passwd", "/etc/passwd", "llama/../llama", "llama\x00", "~", "%2e%2e", "."]
    names += ["file:///etc/passwd", "http://127.0.0.1/x", "llama ", "LLAMA", "a" * 10_000]
    for name in names:
        cases.append((404, lambda name=name: post(server, json.dumps(chat(name)).encode())))
    wrong = []
    with canary(server):
        for _ in range(SCALE):
            for expected, send in cases:
                response = send()
                if response.status_code != expected or "error" not in response.json():
                    wrong.append((expected, response.status_code, response.text[:200]))
    assert wrong == []


def test_noise_on_the_sockets_kills_nobody(server):
    """Random bytes, beginnings of requests, and requests with random bytes in them."""
    chance = random.Random(7)
    beginnings = [b"", b"POST /v1/completions HTTP/1.1\r\n", b"GET /", b"PRI * HTTP/2.0\r\n\r\n"]
    beginnings += [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ]
    with canary(server):
        for number in range(300 * SCALE):
            noise = chance.choice(beginnings) + chance.randbytes(chance.randrange(400))
            with suppress(OSError), connection_to(server, public=number % 3 > 0) as made:
                made.sendall(noise)
                if chance.random() < 0.5:
                    made.shutdown(socket.SHUT_WR)
                made.settimeout(0.02)
                made.recv(4096)


@contextmanager
def connection_to(server: Guarded, *, public: bool) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET if public else socket.AF_UNIX) as made:
        made.connect(("127.0.0.1", server.port) if public else str(server.running.admin_socket))
        yield made


def test_a_thousand_half_open_connections_are_answered_and_let_go(server):
    with canary(server), ExitStack() as stack:
        held = []
        for _ in range(min(1000 * SCALE, 4000)):
            made = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            made.sendall(b"POST /v1/completions HTTP/1.1\r\nX-A: ")
            held.append(made)
        opened = time.monotonic()
        for made in held:
            made.settimeout(30)
            with suppress(ConnectionResetError):
                assert made.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - opened < 20


# -- what the OpenAPI document allows, and what it does not --------------------------------------

MAX_EXAMPLES = 4 * SCALE


def test_requests_made_from_the_openapi_document_are_answered_or_refused(server, vllm_application):
    document = vllm_application["openapi"]
    document["paths"] = {k: v for k, v in document["paths"].items() if k in MODEL_ROUTES}
    assert len(document["paths"]) >= 6
    schema = schemathesis.openapi.from_dict(document)
    wrong: list[Any] = []
    with canary(server), httpx.Client(base_url=server.running.address, timeout=60) as client:
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=MAX_EXAMPLES,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def ask(case: Any) -> None:
                    wrong.extend(_wrong_with(client, server, case))

                ask()
    assert wrong == []


def _wrong_with(client: httpx.Client, server: Guarded, case: Any) -> list[Any]:
    body = case.body
    if isinstance(body, dict):
        # Else nearly all would stop at the router; and no answer longer than a test may last.
        body = {**body, "model": "llama"}
        for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            body[key] = 2 if key not in body or isinstance(body[key], int) else body[key]
    try:
        content = json.dumps(body).encode()
    except (TypeError, ValueError):
        return []
    headers = {"content-type": "application/json", **server.user_header}
    with suppress(httpx.TimeoutException):
        response = client.request(case.method, case.path, content=content, headers=headers)
        if response.status_code < 400:
            return []
        fine = response.status_code < 500 or response.status_code == 501
        try:
            shaped = isinstance(response.json()["error"]["message"], str)
        except (ValueError, KeyError, TypeError):
            shaped = False
        if fine and shaped:
            return []
        return [(case.method, case.path, response.status_code, response.text[:300], body)]
    return [(case.method, case.path, "no answer", body)]
