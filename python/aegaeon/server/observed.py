"""Around the public application: every request gets an id, and whoever wants hears how it went.

Pure ASGI, so that streams pass through as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aegaeon.core.clock import Clock
from aegaeon.server.exchange import Exchange, open_exchange

_ID_HEADER = b"x-request-id"


class Traces(Protocol):
    """What follows a request from its beginning; `server/tracing.py` implements it."""

    def began(self, exchange: Exchange, headers: Mapping[str, str]) -> Mapping[str, str]:
        """headers: the client's; returns those that the application gets instead of its own."""

    def ended(self, exchange: Exchange) -> None: ...


class Observed:
    """Passes everything on to `app`.

    route_of: the name of a path among the known routes; None for any other.
    The client's `x-request-id`, or one that is made here, goes to the application and back in the
    answer's headers. ended: called after each HTTP request, in order; they must not raise.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        clock: Clock,
        route_of: Callable[[str], str | None],
        ended: Sequence[Callable[[Exchange], None]] = (),
        traces: Traces | None = None,
    ) -> None:
        self._app = app
        self._clock = clock
        self._route_of = route_of
        self._traces = traces
        self._ended = (*ended, *([] if traces is None else [traces.ended]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        proposed = next((value for key, value in scope["headers"] if key == _ID_HEADER), None)
        others = [(key, value) for key, value in scope["headers"] if key != _ID_HEADER]
        scope = dict(scope)
        exchange = open_exchange(
            scope,
            route=self._route_of(scope["path"]),
            request_id=None if proposed is None else proposed.decode("latin-1"),
            began_s=self._clock.now(),
        )
        scope["headers"] = [
            *(others if self._traces is None else _traced(self._traces, exchange, others)),
            (_ID_HEADER, exchange.id.encode()),
        ]

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


def _traced(
    traces: Traces, exchange: Exchange, headers: Sequence[tuple[bytes, bytes]]
) -> list[tuple[bytes, bytes]]:
    known = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers}
    instead = {key.encode(): value.encode() for key, value in traces.began(exchange, known).items()}
    return [*((key, value) for key, value in headers if key not in instead), *instead.items()]


def _with_id(message: Message, request_id: str) -> list[tuple[bytes, bytes]]:
    headers = message.get("headers", ())
    return [
        *((key, value) for key, value in headers if key.lower() != _ID_HEADER),
        (_ID_HEADER, request_id.encode()),
    ]
