"""HTTP/1.1 with limits before any work is done: on bytes of the head, on time, on connections.

uvicorn's own protocol, which has none of them.
"""

import asyncio
import http
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_UCRED = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may take, in bytes and seconds.

    head_s: from its opening, or the first byte of a later request, to the end of the headers; also
    from bytes between two requests, which belong to none, to the beginning of the next one.
    body_s: from there to the end of the body. write_s: without reading any of what was sent.
    """

    max_head_bytes: int = 16 << 10
    max_connections: int = 4096
    head_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 60.0


class BoundedProtocol(HttpToolsProtocol):
    """Refuses with an error in OpenAI's shape, closes the connection, and logs nothing."""

    limits = ConnectionLimits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0
        self._silent = True
        self._refused = False

    # -- the connection --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, "too_many_connections", "too many connections are open")
            return
        self._arm(self.limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._reading_again()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._silent = False
        began_in_head = self._in_head
        super().data_received(data)
        if began_in_head and self._in_head and not self._refused:
            # All of it belongs to the head, which is not complete. The parser keeps parts of it
            # that no callback has seen yet.
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_head_bytes:
                self._refuse_head()
        if self._deadline is None and self._between_requests() and not self._refused:
            # uvicorn's timer of an idle connection has ended with these bytes, and they have not
            # begun a request: an empty line, or the end of a body that was answered before it came.
            self._arm(self.limits.head_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._reading_again()
        super().resume_writing()

    # -- the parser ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # The first one's time runs since the connection was opened.
        if self._deadline is None or not self._in_head:
            self._arm(self.limits.head_s)
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if head_bytes > self.limits.max_head_bytes:
            self._refuse_head()
            return
        super().on_headers_complete()
        self._arm(self.limits.body_s)

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        if not self._refused:
            super().on_message_complete()

    # -- refusals --------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """What uvicorn does about bytes that are not HTTP."""
        self._refuse(400, "invalid_http", "this is not HTTP/1.1")

    def _refuse_head(self) -> None:
        limit = self.limits.max_head_bytes
        self._refuse(431, "head_too_large", f"request line and headers exceed {limit} bytes")

    def _too_slow(self) -> None:
        self._deadline = None
        if self.pipeline:
            # It waits behind an answer, and nobody reads it until that is complete.
            self._arm(self.limits.body_s)
            return
        if self._silent or (self._between_requests() and not self._in_head):
            # Opened ahead, or kept, by a client that may be about to use it: an answer would be
            # taken for that of its request.
            self.transport.close()
            return
        self._refuse(408, "request_timeout", "the request did not arrive in time")

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer and close; only close when an answer has begun."""
        if self._refused:
            return
        self._refused = True
        self._disarm()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            error = {
                "message": message,
                "type": "invalid_request_error" if status < 500 else "server_error",
                "param": None,
                "code": code,
            }
            body = json.dumps({"error": error}).encode()
            retry = b"retry-after: 1\r\n" if status == 503 else b""
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s"
                b"connection: close\r\n\r\n%s"
                % (status, http.HTTPStatus(status).phrase.encode(), len(body), retry, body)
            )
        self.transport.close()

    def _between_requests(self) -> bool:
        """All that was asked is answered; the head of another request may be on its way."""
        return self.cycle is not None and self.cycle.response_complete and not self.pipeline

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _reading_again(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None


class OwnUserProtocol(BoundedProtocol):
    """On a unix socket: only this user and root, whatever has become of the file's mode."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, user, _ = _UCRED.unpack(credentials)
        if user not in (0, os.getuid()):
            transport.abort()
