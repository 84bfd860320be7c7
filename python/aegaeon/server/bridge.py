"""A door of the admin socket for a browser: loopback only, reading only, with a key of its own.

A browser cannot open a unix socket, and whoever may connect to a loopback port is not only the user
it belongs to: other users of the machine, and pages of other sites in the user's own browser, by
its address or by a name that they make point to it.
"""

import asyncio
import hmac
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from aegaeon.server.dashboard import dashboard

_COOKIE = "aegaeon-dashboard"
_LOOPBACK = ["127.0.0.1", "localhost"]
_READS = ("/admin/state", "/admin/switches", "/admin/timeline", "/admin/events")


def new_key() -> str:
    """For the address that is printed; 256 bits."""
    return secrets.token_urlsafe(32)


def serve_bridge(listener: socket.socket, admin_socket: Path, key: str) -> None:
    """Serve `bridge_app` on `listener` until SIGINT or SIGTERM."""
    closing = asyncio.Event()
    config = uvicorn.Config(
        bridge_app(admin_socket, key, closing=closing),
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    _Server(config, closing).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Lets its streams know that they are to end: a browser would keep its own open for ever."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()
        super().handle_exit(sig, frame)


def bridge_app(admin_socket: Path, key: str, *, closing: asyncio.Event | None = None) -> Starlette:
    """The dashboard at `/dashboard?key=KEY`, and what it reads of `admin_socket`.

    The key goes into a cookie and out of the address. Orders are not passed on. closing: when it is
    set, what is being passed on ends.
    """
    closing = closing or asyncio.Event()

    def refusal(request: Request) -> Response | None:
        if not hmac.compare_digest(request.cookies.get(_COOKIE, "").encode(), key.encode()):
            return PlainTextResponse("open the address that `aegaeon dashboard` printed", 401)
        return None

    async def page(request: Request) -> Response:
        given = request.query_params.get("key")
        if given is not None and hmac.compare_digest(given.encode(), key.encode()):
            answer = RedirectResponse("/dashboard", status_code=303)
            answer.set_cookie(_COOKIE, key, httponly=True, samesite="strict")
            answer.headers["Referrer-Policy"] = "no-referrer"
            return answer
        return refusal(request) or await dashboard(request)

    async def read(request: Request) -> Response:
        refused = refusal(request)
        if refused is not None:
            return refused
        transport = httpx.AsyncHTTPTransport(uds=str(admin_socket))
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=90.0)
        asked = client.build_request("GET", request.url.path, params=request.query_params)
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError:
            await client.aclose()
            return PlainTextResponse(f"no server listens on {admin_socket}", 502)
        return StreamingResponse(
            _passed_on(client, answer, closing),
            status_code=answer.status_code,
            media_type=answer.headers.get("content-type"),
            headers={"Cache-Control": "no-store"},
        )

    return Starlette(
        routes=[
            Route("/dashboard", page, methods=["GET"]),
            *(Route(path, read, methods=["GET"]) for path in _READS),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK)],
    )


async def _passed_on(
    client: httpx.AsyncClient, answer: httpx.Response, closing: asyncio.Event
) -> AsyncIterator[bytes]:
    chunks = answer.aiter_bytes()
    ending = asyncio.ensure_future(closing.wait())
    try:
        while True:
            next_one = asyncio.ensure_future(anext(chunks, None))
            await asyncio.wait({next_one, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not next_one.done():
                next_one.cancel()
                with suppress(asyncio.CancelledError):
                    await next_one
                return
            chunk = next_one.result()
            if chunk is None:
                return
            yield chunk
    except httpx.HTTPError:
        pass  # the server has ended; the browser sees the end of the answer and asks again
    finally:
        ending.cancel()
        await answer.aclose()
        await client.aclose()
