"""Ids and metrics of requests, over the real router and small real applications."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from aegaeon.core.clock import MonotonicClock
from aegaeon.core.serving import ServedModel
from aegaeon.server.app import Limits, Router, route_of
from aegaeon.server.exchange import Exchange
from aegaeon.server.metrics import FrontMetrics
from aegaeon.server.observed import Observed

PATH = "/v1/completions"


class Front:
    """The public application as the launcher composes it."""

    def __init__(self, **options: Any) -> None:
        self.exchanges: list[Exchange] = []

        async def complete(request: Request) -> JSONResponse:
            return JSONResponse({"id": request.headers["x-request-id"]})

        async def cards() -> list[dict[str, Any]]:
            return [{"id": "a"}]

        async def text() -> str:
            return ""

        async def states() -> dict[str, str]:
            return {}

        app = Starlette(routes=[Route(PATH, complete, methods=["POST"])])
        router = Router(
            limits=Limits(max_body_bytes=200, max_open_requests=options.pop("max_open", 2)),
            metrics=text,
            states=states,
            **options,
        )
        model = ServedModel(name="a", aliases=("alias",), app=app, cards=cards)
        asyncio.run(router.resume([model]))
        self.metrics = FrontMetrics(["a"], router.num_open)
        ended = (self.metrics.ended, self.exchanges.append)
        self.app = Observed(router, clock=MonotonicClock(), route_of=route_of, ended=ended)

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(run())

    def series(self) -> dict[str, float]:
        lines = self.metrics.exposition().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {key: float(value) for key, value in pairs if "_created" not in key}


def test_a_request_keeps_the_id_its_client_chose_and_else_gets_one():
    front = Front()
    body = {"model": "a"}
    chosen = front.call("POST", PATH, json=body, headers={"X-Request-Id": "job-7.a_b"})
    assert chosen.headers.get_list("x-request-id") == [chosen.json()["id"]] == ["job-7.a_b"]
    made = {front.call("POST", PATH, json=body).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for bad in ("", "a b", "-x", "x" * 129, "é"):
        headers = {"x-request-id": bad.encode("latin-1")}
        answer = front.call("POST", PATH, json=body, headers=headers)
        assert answer.headers["x-request-id"] == answer.json()["id"] != bad


def test_answers_are_counted_by_model_and_status_and_refusals_by_reason():
    front = Front(max_open=0)
    front.call("GET", "/v1/models")
    front.call("POST", PATH, json={"model": "alias"})
    front.call("POST", PATH, json={"model": "nobody"})
    front.call("POST", PATH, content=b"{")
    front.call("POST", PATH, content=b"x" * 300)
    series = front.series()
    prefix = "aegaeon_requests_refused_total"
    assert series[f'{prefix}{{model_name="a",reason="rate_limit_exceeded"}}'] == 1
    assert series[f'{prefix}{{model_name="",reason="model_not_found"}}'] == 1
    assert series[f'{prefix}{{model_name="",reason="invalid_json"}}'] == 1
    assert series[f'{prefix}{{model_name="",reason="request_too_large"}}'] == 1
    prefix = "aegaeon_http_requests_total"
    assert series[f'{prefix}{{model_name="",status="200"}}'] == 1
    assert series[f'{prefix}{{model_name="a",status="429"}}'] == 1
    assert front.metrics.snapshot()["refused"][0]["count"] == 1


def test_what_cannot_be_on_time_is_counted_as_refused_by_admission():
    async def admit(model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
        return 3.0

    front = Front(admit=admit)
    assert front.call("POST", PATH, json={"model": "a"}).status_code == 429
    labels = '{model_name="a",reason="deadline_cannot_be_met"}'
    assert front.series()[f"aegaeon_requests_refused_total{labels}"] == 1


def test_an_instance_that_is_gone_is_said_by_the_front():
    state = (True, 0)
    metrics = FrontMetrics(["a"], lambda model: 0, lambda: state)
    assert "aegaeon_instance_up 1.0" in metrics.exposition()
    state = (False, 3)
    text = metrics.exposition()
    assert "aegaeon_instance_up 0.0" in text
    assert "aegaeon_instance_restarts_total 3.0" in text


def test_a_client_cannot_make_series():
    front = Front()
    front.call("POST", PATH, json={"model": "a"})
    front.call("POST", PATH, json={"model": "x"})
    front.call("GET", "/y")
    before = set(front.series())
    for number in range(50):
        name = f"m{number}"
        front.call("POST", PATH, json={"model": name}, headers={"x-request-id": name})
        front.call("GET", f"/{name}")
    assert set(front.series()) == before


def test_times_are_in_order_and_a_request_that_is_refused_has_its_code():
    front = Front()
    front.call("POST", PATH, json={"model": "a"})
    front.call("POST", PATH, json={"model": "x"})
    served, refused = front.exchanges
    assert (served.model, served.status, served.error_code) == ("a", 200, None)
    assert (refused.model, refused.status, refused.error_code) == (None, 404, "model_not_found")
    for each in front.exchanges:
        assert each.first_s is not None
        assert each.ended_s is not None
        assert each.began_s <= each.first_s <= each.ended_s


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_what_is_not_http_passes_through(kind):
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    observed = Observed(app, clock=MonotonicClock(), route_of=route_of)
    scope = {"type": kind}
    asyncio.run(observed(scope, None, None))  # type: ignore[arg-type]
    assert seen == [scope]
