"""Around the public application: every request gets an id, and whoever wants hears how it went.

Pure ASGI, so that streams pass through as they are.
"""

from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aegaeon.core.clock import Clock
from aegaeon.server.exchange import Exchange, open_exchange

_ID_HEADER = b"x-request-id"


class Observed:
    """Passes everything on to `app`.

    The client's `x-request-id`, or one that is made here, goes to the application and back in the
    answer's headers. ended: called after each HTTP request, in order; they must not raise.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        clock: Clock,
        ended: Sequence[Callable[[Exchange], None]] = (),
    ) -> None:
        self._app = app
        self._clock = clock
        self._ended = tuple(ended)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        proposed = next((value for key, value in scope["headers"] if key == _ID_HEADER), None)
        others = [(key, value) for key, value in scope["headers"] if key != _ID_HEADER]
        scope = dict(scope)
        exchange = open_exchange(
            scope,
            request_id=None if proposed is None else proposed.decode("latin-1"),
            began_s=self._clock.now(),
        )
        scope["headers"] = [*others, (_ID_HEADER, exchange.id.encode())]

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": _with_id(message, exchange.id)}
            elif exchange.first_s is None and message.get("body"):
                exchange.first_s = self._clock.now()
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            exchange.ended_s = self._clock.now()
            for tell in self._ended:
                tell(exchange)


def _with_id(message: Message, request_id: str) -> list[tuple[bytes, bytes]]:
    headers = message.get("headers", ())
    return [
        *((key, value) for key, value in headers if key.lower() != _ID_HEADER),
        (_ID_HEADER, request_id.encode()),
    ]
