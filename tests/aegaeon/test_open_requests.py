"""Requests that are ended from outside, at every stage of their answer."""

import asyncio
import json
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aegaeon.core.serving import ServedModel
from aegaeon.server.app import Limits, Router
from aegaeon.server.open_requests import Unavailable

GONE = Unavailable("instance_restarting", "it ended by signal 9", retry_after_s=7)
CHAT = "/v1/chat/completions"


async def router_over(endpoint: Any, path: str = CHAT, lifespan: Any = None) -> Router:
    async def nothing() -> Any:
        return {}

    async def cards() -> list[dict[str, Any]]:
        return []

    router = Router(
        limits=Limits(max_body_bytes=1000, max_open_requests=9), metrics=nothing, states=nothing
    )
    app = Starlette(routes=[Route(path, endpoint, methods=["POST"])], lifespan=lifespan)
    await router.resume([ServedModel(name="m", aliases=(), app=app, cards=cards)])
    return router


class Exchange:
    """One request over raw ASGI, so that what is sent can be seen while it is not complete."""

    def __init__(self, router: Router, path: str = CHAT) -> None:
        self.sent: list[Any] = []
        self._incoming: list[Any] = [{"type": "http.request", "body": b'{"model": "m"}'}]
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        self.task = asyncio.ensure_future(router(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._incoming:
            return self._incoming.pop()
        return await asyncio.Event().wait()

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def until(self, num_messages: int) -> None:
        while len(self.sent) < num_messages:
            await asyncio.sleep(0.001)


async def never(request: Request) -> Response:
    await asyncio.Event().wait()
    raise AssertionError


async def one_event(request: Request) -> Response:
    async def events():
        yield 'data: {"token": 1}\n\n'
        await asyncio.Event().wait()

    return StreamingResponse(events(), media_type="text/event-stream")


async def half_a_body(request: Request) -> Response:
    async def halves():
        yield '{"first": '
        await asyncio.Event().wait()

    return StreamingResponse(halves(), media_type="application/json")


def test_a_request_without_an_answer_yet_is_a_503_that_says_when_to_come_back():
    async def run() -> Exchange:
        router = await router_over(never)
        exchange = Exchange(router)
        await asyncio.sleep(0.01)
        assert router.num_open() == 1
        await router.suspend(GONE)
        await asyncio.wait_for(exchange.task, 2.0)
        assert router.num_open() == 0
        return exchange

    exchange = asyncio.run(run())
    start = exchange.sent[0]
    assert start["status"] == 503
    assert (b"retry-after", b"7") in start["headers"]
    error = json.loads(exchange.body)["error"]
    assert (error["code"], error["message"]) == ("instance_restarting", "it ended by signal 9")


@pytest.mark.parametrize(
    ("path", "last"),
    [
        (CHAT, b'data: {"error": {"message": "it ended by signal 9"'),
        ("/v1/responses", b'event: error\ndata: {"message": "it ended by signal 9"'),
        ("/v1/messages", b'event: error\ndata: {"type": "error", "error": {"type": "api_error"'),
    ],
)
def test_a_stream_ends_with_an_error_event_of_its_api(path, last):
    async def run() -> Exchange:
        router = await router_over(one_event, path)
        exchange = Exchange(router, path)
        await exchange.until(2)
        await router.suspend(GONE)
        await asyncio.wait_for(exchange.task, 2.0)
        return exchange

    exchange = asyncio.run(run())
    assert exchange.body.startswith(b'data: {"token": 1}\n\n')
    assert exchange.sent[-1]["body"].startswith(last)
    assert exchange.sent[-1]["more_body"] is False


def test_half_an_answer_is_never_made_to_look_complete():
    async def run() -> Exchange:
        router = await router_over(half_a_body)
        exchange = Exchange(router)
        await exchange.until(2)
        await router.suspend(GONE)
        await asyncio.wait_for(exchange.task, 2.0)
        return exchange

    exchange = asyncio.run(run())
    assert exchange.body == b'{"first": '
    assert all(message.get("more_body", True) for message in exchange.sent)


def test_an_application_that_does_not_listen_is_not_heard_any_more():
    """It goes on after its task was cancelled, and what it then sends reaches nobody."""

    async def deaf(request: Request) -> Response:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return JSONResponse({"late": True})
        raise AssertionError

    async def run() -> Exchange:
        router = await router_over(deaf)
        exchange = Exchange(router)
        await asyncio.sleep(0.01)
        await router.suspend(GONE)
        await asyncio.wait_for(exchange.task, 2.0)
        return exchange

    exchange = asyncio.run(run())
    assert exchange.sent[0]["status"] == 503
    assert b"late" not in exchange.body


def test_a_client_that_does_not_read_holds_up_nobody():
    async def run() -> None:
        router = await router_over(never)
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        incoming = [{"type": "http.request", "body": b'{"model": "m"}'}]

        async def receive() -> Any:
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            await asyncio.Event().wait()

        task = asyncio.ensure_future(router(scope, receive, send))
        await asyncio.sleep(0.01)
        await router.suspend(GONE)
        await asyncio.wait_for(task, 2.0)

    asyncio.run(run())


def test_an_application_ends_after_its_requests_and_what_they_left_behind():
    """vLLM waits for a disconnect in a task of its own, which then looks at the application."""
    seen: list[str] = []

    async def leaves_a_task(request: Request) -> Response:
        async def wait_for_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            seen.append("disconnect")

        tasks.append(asyncio.create_task(wait_for_disconnect()))
        await asyncio.Event().wait()
        raise AssertionError

    tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def lifespan(app):
        yield
        seen.append("application")

    async def run() -> None:
        router = await router_over(leaves_a_task, lifespan=lifespan)
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            asking = asyncio.create_task(client.post(CHAT, json={"model": "m"}))
            await asyncio.sleep(0.05)
            await router.suspend(GONE)
            assert (await asking).status_code == 503
            await asyncio.gather(*tasks)

    asyncio.run(run())
    assert seen == ["disconnect", "application"]


def test_who_cancels_the_request_from_elsewhere_still_can():
    async def run() -> None:
        router = await router_over(never)
        exchange = Exchange(router)
        await asyncio.sleep(0.01)
        exchange.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.task
        assert exchange.sent == []
        assert router.num_open() == 0

    asyncio.run(run())


def test_after_a_restart_the_new_applications_are_asked():
    async def fine(request: Request) -> Response:
        return JSONResponse({"by": "the second"})

    async def run() -> list[httpx.Response]:
        router = await router_over(never)
        transport = httpx.ASGITransport(router)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            await router.suspend(GONE)
            answers = [
                await client.post(CHAT, json={"model": "m"}),
                await client.get("/health"),
            ]

            async def cards() -> list[dict[str, Any]]:
                return []

            app = Starlette(routes=[Route(CHAT, fine, methods=["POST"])])
            await router.resume([ServedModel(name="m", aliases=(), app=app, cards=cards)])
            answers += [
                await client.post(CHAT, json={"model": "m"}),
                await client.get("/health"),
            ]
            router.report_stalled(Unavailable("instance_stalled", "for 9 s", retry_after_s=1))
            answers += [
                await client.get("/health"),
                await client.post(CHAT, json={"model": "m"}),
            ]
            router.report_stalled(None)
            router.refuse(Unavailable("draining", "about to end", retry_after_s=1))
            answers.append(await client.post(CHAT, json={"model": "m"}))
        return answers

    answers = asyncio.run(run())
    assert [answer.status_code for answer in answers] == [503, 503, 200, 200, 503, 200, 503]
    assert answers[0].headers["retry-after"] == "7"
    assert answers[1].json()["error"]["code"] == "instance_restarting"
    assert answers[4].json()["error"]["code"] == "instance_stalled"
