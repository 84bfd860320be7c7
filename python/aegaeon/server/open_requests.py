"""What a model's application sends for one request, until the request is ended from outside."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from aegaeon.server.errors import error_response
from aegaeon.server.exchange import note_error

logger = logging.getLogger(__name__)

# For the last words to a client that may not read them.
_LAST_WORDS_S = 1.0


@dataclass(frozen=True)
class Unavailable:
    """Why requests cannot be served. retry_after_s: when to try again; None: not here."""

    code: str
    message: str
    retry_after_s: int | None = None

    def response(self) -> JSONResponse:
        return error_response(
            503,
            self.message,
            type="server_error",
            code=self.code,
            retry_after_s=self.retry_after_s,
        )


class OpenRequest:
    """One request in the hands of a model's application."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._task = asyncio.current_task()
        self._started = False
        self._complete = False
        self._is_event_stream = False
        self._ended: Unavailable | None = None
        self._over = asyncio.Event()

    async def run(self, application: Callable[[Send], Awaitable[None]]) -> None:
        """Run the application to its end, or to that of the request."""
        try:
            await self._run(application)
        finally:
            self._over.set()

    async def over(self) -> None:
        """Wait until `run` has ended."""
        await self._over.wait()

    async def _run(self, application: Callable[[Send], Awaitable[None]]) -> None:
        try:
            await application(self._relay)
        except asyncio.CancelledError:
            if self._ended is None or self._task is None:
                raise
            self._task.uncancel()  # it was `end` that cancelled, and here that is over
        except Exception:
            if self._ended is None:
                raise
            logger.debug("an application failed while its request was ended", exc_info=True)
        if self._ended is not None and not self._complete:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._say(self._ended), _LAST_WORDS_S)

    def end(self, why: Unavailable) -> None:
        """Stop the application; the client gets `why` as an error. Not from within `run`."""
        if self._ended is None and self._task is not None:
            self._ended = why
            self._task.cancel()

    async def _relay(self, message: Message) -> None:
        if self._ended is not None:
            return
        if message["type"] == "http.response.start":
            self._started = True
            headers = dict(message.get("headers", ()))
            self._is_event_stream = headers.get(b"content-type", b"").startswith(
                b"text/event-stream"
            )
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def _say(self, why: Unavailable) -> None:
        note_error(self._scope, why.code)
        if not self._started:
            await why.response()(self._scope, self._receive, self._send)
        elif self._is_event_stream:
            body = _as_event(self._scope["path"], why)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        # Else it stays incomplete: the server closes the connection, and the client sees that the
        # answer was cut off. There is no other way to say so after a status of 200.


def _as_event(path: str, why: Unavailable) -> bytes:
    """The error as the clients of the route `path` expect it in a stream."""
    error = {"message": why.message, "type": "server_error", "param": None, "code": why.code}
    match path:
        case "/v1/messages":
            named = {"type": "error", "error": {"type": "api_error", "message": why.message}}
            return f"event: error\ndata: {json.dumps(named)}\n\n".encode()
        case "/v1/responses":
            return f"event: error\ndata: {json.dumps({**error, 'type': 'error'})}\n\n".encode()
        case _:
            return f"data: {json.dumps({'error': error})}\n\n".encode()
