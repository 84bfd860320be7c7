"""The router, over small real ASGI applications and a real in-process HTTP client."""

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aegaeon.core.errors import InstanceDied, OrderRefused, UnknownModel
from aegaeon.core.serving import ServedModel, unserved
from aegaeon.server.app import Limits, Router
from aegaeon.server.auth import ApiKeys
from aegaeon.server.open_requests import Unavailable

CHAT = "/v1/chat/completions"
GONE = Unavailable("instance_restarting", "it ended by signal 9", retry_after_s=7)


def echo_app(name: str, lifespan: Any = None) -> Starlette:
    """Answers with its own name and the body it was given."""

    async def chat(request: Request) -> JSONResponse:
        return JSONResponse({"served_by": name, "body": await request.json()})

    async def secret(request: Request) -> JSONResponse:
        return JSONResponse({"secret": name})

    routes = [
        Route(CHAT, chat, methods=["POST"]),
        Route("/sleep", secret, methods=["POST"]),
        Route("/docs", secret),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def served(name: str, *aliases: str, app: Any = None) -> ServedModel:
    async def cards() -> list[dict[str, Any]]:
        return [{"id": each, "object": "model"} for each in (name, *aliases)]

    return ServedModel(name=name, aliases=aliases, app=app or echo_app(name), cards=cards)


def make_bare_router(*, alive: bool = True, **options: Any) -> Router:
    """Has no models yet."""

    async def metrics() -> str:
        return "aegaeon_switches_total 3\n"

    async def states() -> dict[str, str]:
        if not alive:
            raise InstanceDied("host", -9)
        return {"a": "resident", "b": "host"}

    limits = options.pop("limits", Limits(max_body_bytes=1000, max_open_requests=2))
    return Router(limits=limits, metrics=metrics, states=states, **options)


def make_router(*models: ServedModel, alive: bool = True, **options: Any) -> Router:
    router = make_bare_router(alive=alive, **options)
    asyncio.run(router.resume(models or (served("a", "alias-a"), served("b"))))
    if not alive:
        asyncio.run(router.suspend(GONE))
    return router


def call(router: Router, method: str, path: str, **kwargs: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(run())


def test_a_model_out_of_service_is_a_503_and_the_others_are_served():
    failures: dict[str, str] = {}
    router = make_router(failures=lambda: failures)
    assert call(router, "POST", CHAT, json={"model": "a"}).status_code == 200
    failures["a"] = "RuntimeError: no such file: /models/a/secret"
    for name in ("a", "alias-a"):
        response = call(router, "POST", CHAT, json={"model": name})
        assert response.status_code == 503
        error = error_of(response)
        assert error["code"] == "model_out_of_service"
        assert f"{name!r} is out of service (RuntimeError)" in error["message"]
        assert "secret" not in error["message"]
    assert call(router, "POST", CHAT, json={"model": "b"}).json()["served_by"] == "b"
    listed = call(router, "GET", "/v1/models").json()["data"]
    states = {card["id"]: card["state"] for card in listed}
    assert states == {"a": "failed", "alias-a": "failed", "b": "host"}


def test_a_model_that_was_never_loaded_is_listed_and_answered_for():
    models = unserved("a", ("alias-a",)), served("b")
    router = make_router(*models, failures=lambda: {"a": "OSError: x"})
    listed = call(router, "GET", "/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["a", "alias-a", "b"]
    assert call(router, "POST", CHAT, json={"model": "alias-a"}).status_code == 503


@pytest.mark.parametrize(("name", "by"), [("a", "a"), ("b", "b"), ("alias-a", "a")])
def test_a_request_reaches_the_model_it_names_with_its_body_untouched(name, by):
    body = {"model": name, "messages": [{"role": "user", "content": "ü"}]}
    response = call(make_router(), "POST", CHAT, json=body)
    assert response.json() == {"served_by": by, "body": body}


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_an_unknown_model_is_a_404_that_lists_the_valid_names():
    response = call(make_router(), "POST", CHAT, json={"model": "c"})
    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "model_not_found"
    assert "a, alias-a, b" in error["message"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'"a"', 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"{}", 400, "missing_model"),
        (b'{"model": 7}', 400, "missing_model"),
        (b'{"model": ""}', 400, "missing_model"),
        (b'{"model": "a", "x": ' + b"[" * 70 + b"]" * 70 + b"}", 400, "invalid_json"),
        (b"[" * 990, 400, "invalid_json"),
        (b'{"model": "a", "temperature": NaN}', 400, "invalid_json"),
        (b'{"model": "a", "temperature": -Infinity}', 400, "invalid_json"),
        (b'{"model": "b", "model": "a"}', 400, "invalid_json"),
        (b'{"model": "a", "n": 9}', 400, "too_many_answers"),
        (b'{"model": "a", "best_of": 1' + b"0" * 900 + b"}", 400, "too_many_answers"),
        (b'{"model": "../../etc/passwd"}', 404, "model_not_found"),
        (b'{"model": "a/../a"}', 404, "model_not_found"),
        (b'{"model": "a\\u0000"}', 404, "model_not_found"),
        (b'{"model": "a", "x": "' + b"[" * 200 + b'\\"{"}', 200, None),
        (b'{"model": "a", "x": "' + b"y" * 1000 + b'"}', 413, "request_too_large"),
    ],
)
def test_a_body_that_cannot_be_dispatched_is_refused(content, status, code):
    response = call(make_router(), "POST", CHAT, content=content)
    assert response.status_code == status
    if code is not None:
        assert error_of(response)["code"] == code


def test_a_body_without_declared_length_is_cut_off_at_the_limit():
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 100
            yield b"x" * 100

    response = call(make_router(), "POST", CHAT, content=endless())
    assert response.status_code == 413
    assert sent <= 1200


@pytest.mark.parametrize(
    "path",
    ["/sleep", "/docs", "/openapi.json", "/", "/v3/x", "/v1/load_lora_adapter", "/v1/../sleep"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_routes_of_an_application_that_name_no_model_are_not_reachable(method, path):
    response = call(make_router(), method, path, json={"model": "a"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


def test_a_model_route_by_get_is_a_405():
    assert call(make_router(), "GET", CHAT).status_code == 405


def test_models_are_listed_with_their_aliases():
    listing = call(make_router(), "GET", "/v1/models").json()
    assert listing["object"] == "list"
    assert [card["id"] for card in listing["data"]] == ["a", "alias-a", "b"]


@pytest.mark.parametrize(
    ("alive", "states"),
    [(True, ["resident", "resident", "host"]), (False, ["unknown"] * 3)],
)
def test_models_are_listed_with_their_state(alive, states):
    listing = call(make_router(alive=alive), "GET", "/v1/models").json()
    assert [card["state"] for card in listing["data"]] == states


def test_one_model_is_described_and_an_unknown_one_is_a_404():
    assert call(make_router(), "GET", "/v1/models/alias-a").json()["id"] == "alias-a"
    assert call(make_router(), "GET", "/v1/models/c").status_code == 404


@pytest.mark.parametrize(("alive", "status"), [(True, 200), (False, 503)])
def test_health_is_that_of_the_instance(alive, status):
    assert call(make_router(alive=alive), "GET", "/health").status_code == status


def test_a_large_body_is_parsed_beside_the_event_loop():
    body = {"model": "b", "prompt": "x" * 500_000}
    limits = Limits(max_body_bytes=1 << 20, max_open_requests=2)
    response = call(make_router(limits=limits), "POST", CHAT, json=body)
    assert response.json() == {"served_by": "b", "body": body}


def test_health_may_be_asked_for_without_a_body():
    response = call(make_router(), "HEAD", "/health")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("error", [InstanceDied("host", -9), TimeoutError()])
def test_metrics_of_an_instance_that_is_gone_are_a_503(error):
    async def metrics() -> str:
        raise error

    async def gone() -> dict[str, str]:
        raise error

    limits = Limits(max_body_bytes=1000, max_open_requests=2)
    router = Router(limits=limits, metrics=metrics, states=gone)
    asyncio.run(router.resume([served("a")]))
    response = call(router, "GET", "/metrics")
    assert response.status_code == 503
    assert error_of(response)["code"] == "instance_down"


def test_metrics_are_passed_on():
    assert "aegaeon_switches_total 3" in call(make_router(), "GET", "/metrics").text


def test_requests_beyond_the_limit_of_a_model_are_a_429_and_others_go_on():
    release = asyncio.Event()

    async def slow(request: Request) -> JSONResponse:
        await release.wait()
        return JSONResponse({})

    slow_app = Starlette(routes=[Route(CHAT, slow, methods=["POST"])])
    router = make_router(served("slow", app=slow_app), served("b"))

    async def run() -> None:
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            held = [
                asyncio.create_task(client.post(CHAT, json={"model": "slow"})) for _ in range(2)
            ]
            await asyncio.sleep(0.05)
            refused = await client.post(CHAT, json={"model": "slow"})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "rate_limit_exceeded"
            assert (await client.post(CHAT, json={"model": "b"})).status_code == 200
            release.set()
            assert [(await task).status_code for task in held] == [200, 200]
            assert (await client.post(CHAT, json={"model": "slow"})).status_code == 200

    asyncio.run(run())


def test_requests_beyond_the_limit_of_all_models_are_a_503():
    release = asyncio.Event()

    async def slow(request: Request) -> JSONResponse:
        await release.wait()
        return JSONResponse({})

    slow_app = Starlette(routes=[Route(CHAT, slow, methods=["POST"])])
    limits = Limits(max_body_bytes=1000, max_open_requests=9, max_open_total=2)
    router = make_router(served("slow", app=slow_app), served("b"), limits=limits)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            held = [
                asyncio.create_task(client.post(CHAT, json={"model": "slow"})) for _ in range(2)
            ]
            await asyncio.sleep(0.05)
            refused = await client.post(CHAT, json={"model": "b"})
            release.set()
            await asyncio.gather(*held)
        return refused

    refused = asyncio.run(run())
    assert (refused.status_code, error_of(refused)["code"]) == (503, "server_overloaded")
    assert int(refused.headers["retry-after"]) >= 1


def test_limits_and_aliases_can_be_changed_while_it_serves():
    renamed: list[tuple[str, ...]] = []
    model = replace(served("a", "old"), rename=renamed.append)
    router = make_router(model, served("b"))
    limits = Limits(max_body_bytes=1000, max_open_requests=2, max_n=1)
    assert call(router, "POST", CHAT, json={"model": "old", "n": 2}).status_code == 200
    router.reconfigure(limits=limits, admit=None, aliases={"a": ("new",), "b": ()})
    assert renamed == [("new",)]
    assert call(router, "POST", CHAT, json={"model": "new"}).json()["served_by"] == "a"
    assert call(router, "POST", CHAT, json={"model": "old"}).status_code == 404
    assert call(router, "POST", CHAT, json={"model": "a", "n": 2}).status_code == 400


def test_a_name_that_does_not_exist_is_not_sent_back_at_any_length():
    limits = Limits(max_body_bytes=1 << 20, max_open_requests=2)
    response = call(make_router(limits=limits), "POST", CHAT, json={"model": "x" * 100_000})
    assert response.status_code == 404
    assert len(response.content) < 1000


def test_a_disconnect_reaches_the_models_application():
    """What vLLM relies on to abort a request: `receive` behind the body is the server's own."""
    seen: list[str] = []

    async def app(scope, receive, send):
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])

    router = make_router(served("a", app=app))
    messages = [
        {"type": "http.request", "body": b'{"model":', "more_body": True},
        {"type": "http.request", "body": b'"a"}', "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        raise AssertionError("nobody is there to read an answer")

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(router(scope, receive, send))
    assert seen == ["http.request", "http.disconnect"]


def test_a_client_that_leaves_before_its_body_is_complete_gets_nothing():
    messages = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        raise AssertionError("nobody is there to read an answer")

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(make_router()(scope, receive, send))


def key_line(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer right", 200),
        ("bearer right", 200),
        ("Bearer wrong", 401),
        ("Basic right", 401),
        (None, 401),
    ],
)
def test_with_a_keys_file_only_its_keys_are_let_in(tmp_path, header, status):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{key_line('other')}\n\n{key_line('right')} mine\n")
    router = make_router(api_keys=ApiKeys(file))
    headers = {} if header is None else {"authorization": header}
    assert call(router, "POST", CHAT, json={"model": "a"}, headers=headers).status_code == status
    assert call(router, "GET", "/v1/models", headers=headers).status_code == status
    assert call(router, "GET", "/health").status_code == 200


def test_the_lifespans_of_all_applications_are_run():
    events: list[str] = []

    def lifespan_of(name: str) -> Any:
        @asynccontextmanager
        async def lifespan(app):
            events.append(f"start {name}")
            yield
            events.append(f"stop {name}")

        return lifespan

    async def run() -> None:
        router = make_bare_router()
        apps = [served(name, app=echo_app(name, lifespan_of(name))) for name in "ab"]
        await router.resume(apps)
        assert events == ["start a", "start b"]
        await router.suspend(GONE)

    asyncio.run(run())
    assert events == ["start a", "start b", "stop b", "stop a"]


def test_the_models_own_error_body_is_passed_on():
    async def refuse(request: Request) -> JSONResponse:
        return JSONResponse({"error": {"message": "too long"}}, status_code=400)

    router = make_router(served("a", app=Starlette(routes=[Route(CHAT, refuse, methods=["POST"])])))
    response = call(router, "POST", CHAT, json={"model": "a"})
    assert response.status_code == 400
    assert json.loads(response.text) == {"error": {"message": "too long"}}


def chat(router: Router, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return call(router, "POST", CHAT, headers=headers, json={"model": "a", **body})


def test_the_slo_headers_reach_the_model_as_arguments_of_its_own():
    headers = {"x-slo-ttft-ms": "500", "X-SLO-TPOT-MS": "20.5"}
    seen = chat(make_router(), headers, vllm_xargs={"other": 1, "slo_ttft_ms": 9}, x="ü")
    assert seen.json()["body"] == {
        "model": "a",
        "x": "ü",
        "vllm_xargs": {"other": 1, "slo_ttft_ms": 500.0, "slo_tpot_ms": 20.5},
    }


def test_a_large_body_keeps_all_it_has_beside_the_slo():
    limits = Limits(max_body_bytes=1 << 20, max_open_requests=2)
    seen = chat(make_router(limits=limits), {"x-slo-tpot-ms": "20"}, text="ü" * 100_000)
    assert seen.json()["body"] == {
        "model": "a",
        "text": "ü" * 100_000,
        "vllm_xargs": {"slo_tpot_ms": 20.0},
    }


def test_half_a_surrogate_pair_is_handed_on_as_it_came():
    async def raw(request: Request) -> Response:
        return Response(await request.body())

    model = served("a", app=Starlette(routes=[Route(CHAT, raw, methods=["POST"])]))
    body = b'{"model": "a", "x": "\\ud800"}'
    response = call(make_router(model), "POST", CHAT, content=body, headers={"x-slo-tpot-ms": "20"})
    assert b'"x": "\\ud800"' in response.content
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e400"])
def test_an_slo_that_is_no_time_is_refused(value):
    response = chat(make_router(), {"x-slo-ttft-ms": value})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("invalid_slo", "x-slo-ttft-ms")


@pytest.mark.parametrize("value", [0, True, [1], "x", 10**400])
def test_an_slo_in_the_body_that_is_no_time_is_refused(value):
    response = chat(make_router(), vllm_xargs={"slo_tpot_ms": value})
    assert response.status_code == 400
    assert error_of(response)["param"] == "slo_tpot_ms"


def test_a_request_that_would_be_late_is_told_when_to_come_back():
    asked: list[tuple[str, int, float | None]] = []

    async def admit(model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
        asked.append((model, prompt_tokens, ttft_ms))
        return 2.3 if ttft_ms == 100.0 else 0.0

    router = make_router(admit=admit)
    assert chat(router).status_code == 200
    refused = chat(router, {"x-slo-ttft-ms": "100"})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "3"
    assert error_of(refused)["code"] == "deadline_cannot_be_met"
    assert [(model, ttft_ms) for model, _, ttft_ms in asked] == [("a", None), ("a", 100.0)]
    assert all(0 < tokens < 20 for _, tokens, _ in asked)


def test_an_instance_that_does_not_answer_refuses_nobody():
    async def admit(model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
        raise TimeoutError

    assert chat(make_router(admit=admit)).status_code == 200


def test_a_model_is_served_once_added_and_its_name_is_unknown_once_removed():
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app):
        events.append("start")
        yield
        events.append("stop")

    async def run() -> None:
        router = make_bare_router()
        await router.resume([served("a", "alias-a"), served("b")])
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            await router.add(served("c", "alias-c", app=echo_app("c", lifespan)))
            answer = await client.post(CHAT, json={"model": "alias-c"})
            assert answer.json()["served_by"] == "c"
            cards = (await client.get("/v1/models")).json()["data"]
            assert [card["id"] for card in cards] == ["a", "alias-a", "b", "c", "alias-c"]
            await router.remove("c", timeout_s=0.0)
            assert events == ["start", "stop"]
            assert (await client.post(CHAT, json={"model": "alias-c"})).status_code == 404
            assert (await client.post(CHAT, json={"model": "a"})).status_code == 200
            with pytest.raises(UnknownModel, match="a, alias-a, b"):
                await router.remove("c", timeout_s=0.0)

    asyncio.run(run())


def test_a_model_with_open_requests_is_removed_after_them_or_stays():
    async def run() -> None:
        goes_on = asyncio.Event()

        async def wait(request: Request) -> JSONResponse:
            await goes_on.wait()
            return JSONResponse({"served_by": "slow"})

        app = Starlette(routes=[Route(CHAT, wait, methods=["POST"])])
        router = make_bare_router()
        await router.resume([served("a"), served("slow", app=app)])
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            open_request = asyncio.create_task(client.post(CHAT, json={"model": "slow"}))
            while not router.num_open("slow"):
                await asyncio.sleep(0)
            with pytest.raises(OrderRefused, match="1 open requests"):
                await router.remove("slow", timeout_s=0.05)
            assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == [
                "a", "slow",
            ]  # fmt: skip
            removed = asyncio.create_task(router.remove("slow", timeout_s=30.0))
            while len((await client.get("/v1/models")).json()["data"]) == 2:
                await asyncio.sleep(0)
            assert (await client.post(CHAT, json={"model": "slow"})).status_code == 404
            assert not removed.done()
            goes_on.set()
            assert (await open_request).json() == {"served_by": "slow"}
            await removed

    asyncio.run(run())


def test_adapters_stay_when_aliases_change_and_no_name_is_given_twice():
    async def run() -> None:
        router = make_bare_router()
        await router.resume([replace(served("a", "old"), adapters=("lora",)), served("b")])
        limits = Limits(max_body_bytes=1000, max_open_requests=2)
        aliases = {"a": ("new",), "b": ("lora", "new", "second")}
        router.reconfigure(limits=limits, admit=None, aliases=aliases)
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            owners = {
                name: (await client.post(CHAT, json={"model": name})).json().get("served_by")
                for name in ("a", "new", "lora", "b", "second", "old")
            }
        assert owners == {
            "a": "a", "new": "a", "lora": "a", "b": "b", "second": "b", "old": None,
        }  # fmt: skip
        with pytest.raises(OrderRefused, match="'lora' is taken"):
            await router.add(served("lora"))

    asyncio.run(run())


def test_the_limit_holds_for_requests_that_wait_for_admission_together():
    async def run() -> None:
        goes_on = asyncio.Event()
        admitted = asyncio.Event()

        async def wait(request: Request) -> JSONResponse:
            await goes_on.wait()
            return JSONResponse({})

        async def admit(model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
            await admitted.wait()
            return 0.0

        app = Starlette(routes=[Route(CHAT, wait, methods=["POST"])])
        router = make_bare_router(admit=admit)
        await router.resume([served("a", app=app)])
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            requests = [
                asyncio.create_task(client.post(CHAT, json={"model": "a"})) for _ in range(5)
            ]
            await asyncio.sleep(0.05)
            admitted.set()
            while router.num_open("a") < 2:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            goes_on.set()
            statuses = [(await request).status_code for request in requests]
        assert sorted(statuses) == [200, 200, 429, 429, 429]

    asyncio.run(run())
