"""One OpenAI-compatible address for all models: an ASGI router by the body's `model`.

Everything behind the dispatch (chat templates, limits, streaming, tool calls) is the model's own
application. The router answers only what concerns more than one model, and what is wrong before a
model is known.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from aegaeon.core.errors import AegaeonError, OrderRefused, UnknownModel
from aegaeon.core.serving import AsgiApp, ServedModel
from aegaeon.server.auth import ApiKeys, unauthorized
from aegaeon.server.errors import error_response
from aegaeon.server.exchange import note_model
from aegaeon.server.objectives import BadObjective, objectives, with_objectives
from aegaeon.server.open_requests import OpenRequest, Unavailable
from aegaeon.server.request_body import dumped, parsed, too_many_answers

logger = logging.getLogger(__name__)

# Routes that name their model in a JSON body. No other route of the applications is reachable from
# outside: control, loading of adapters, documentation, batches that count as one request.
MODEL_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v2/embed",
        "/v2/rerank",
        "/score",
        "/rerank",
        "/classify",
        "/pooling",
        "/tokenize",
        "/detokenize",
    }
)
# Those of them whose answer is a series of tokens, with deadlines.
_TOKEN_ROUTES = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
# For the estimate of a prompt's length before it is tokenized: English text has about four.
_BYTES_PER_TOKEN = 4
_OPEN_ROUTES = frozenset({"/health", "/ready"})
_OWN_ROUTES = _OPEN_ROUTES | {"/metrics", "/v1/models"}
# Parsing more than this is left to a thread, so that the streams of others go on meanwhile.
_PARSED_AT_ONCE_BYTES = 64 << 10
# Of a name that does not exist; what a client sends is not sent back at any length.
_SHOWN_NAME_CHARS = 128
# For open requests to end in, before the applications behind them do.
_ENDING_S = 1.5
_STARTING = Unavailable("starting", "the models are being loaded", retry_after_s=5)
_DRAIN_INTERVAL_S = 0.02
_NO_ANSWER = Unavailable("instance_down", "the instance does not answer", retry_after_s=1)


def route_of(path: str) -> str | None:
    """The route that a path of the public listener is, its variable part by name; None: of none."""
    if path in MODEL_ROUTES or path in _OWN_ROUTES:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else None


Admit = Callable[[str, int, float | None], Awaitable[float]]


@dataclass(frozen=True)
class Limits:
    """What is refused before any work is done."""

    max_body_bytes: int
    max_open_requests: int
    max_open_total: int = 2048
    max_n: int = 8


class Router:
    """The ASGI application of the pool.

    Serves what `resume` has given it, until `suspend`. Only from the event loop's thread.

    metrics: the exposition text of `/metrics`.
    states: the state of each model, by name.
    failures: models out of service, and why.
    admit: (model, about how many prompt tokens, TTFT in ms or None for the model's) -> 0.0, or in
    how many seconds a request may be tried again. None: all are let in.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        metrics: Callable[[], Awaitable[str]],
        states: Callable[[], Awaitable[Mapping[str, str]]],
        admit: Admit | None = None,
        failures: Callable[[], Mapping[str, str]] = dict,
        api_keys: ApiKeys | None = None,
    ) -> None:
        self._models: tuple[ServedModel, ...] = ()
        self._by_name: dict[str, ServedModel] = {}
        self._down: Unavailable | None = _STARTING
        self._stalled: Unavailable | None = None
        self._running: dict[str, AsyncExitStack] = {}
        self._open: set[OpenRequest] = set()
        self._limits = limits
        self._metrics = metrics
        self._states = states
        self._admit = admit
        self._failures = failures
        self._api_keys = api_keys
        self._open_by_model: dict[str, int] = {}

    # -- what the launcher says ------------------------------------------------------------

    async def resume(self, models: Sequence[ServedModel]) -> None:
        """Serve `models`, in this order, from now on. Raises what the start of theirs does."""
        async with AsyncExitStack() as started:
            running = {}
            for model in models:
                running[model.name] = application = AsyncExitStack()
                started.push_async_exit(application)
                await application.enter_async_context(_running(model.app))
            started.pop_all()
        self._running = running
        self._models = tuple(models)
        self._name_models()
        self._open_by_model = dict.fromkeys((model.name for model in self._models), 0)
        self._down = self._stalled = None

    async def suspend(self, why: Unavailable) -> None:
        """End the open requests with `why`, and answer later ones with it, until `resume`."""
        self._down = why
        ending = list(self._open)
        for request in ending:
            request.end(why)
        with suppress(TimeoutError):
            async with asyncio.timeout(_ENDING_S):
                for request in ending:
                    await request.over()
                # What an application has left behind for a request looks at it once more.
                await asyncio.sleep(_ENDING_S / 30)
        running, self._running = self._running, {}
        for application in reversed(running.values()):
            await _stop(application)

    async def add(self, model: ServedModel) -> None:
        """Serve one more model. Raises what the start of its application does, and OrderRefused
        when one of its names is taken.
        """
        if taken := self._by_name.keys() & {*model.names}:
            raise OrderRefused(f"the name {min(taken)!r} is taken")
        async with AsyncExitStack() as started:
            await started.enter_async_context(_running(model.app))
            self._running[model.name] = started.pop_all()
        self._models = (*self._models, model)
        self._open_by_model[model.name] = 0
        self._name_models()

    async def remove(self, name: str, *, timeout_s: float) -> None:
        """Serve `name` no longer, as soon as its open requests have ended; new ones get a 404.

        Raises UnknownModel, and OrderRefused after `timeout_s`: then it is served again.
        """
        model = next((model for model in self._models if model.name == name), None)
        if model is None:
            raise UnknownModel(self._unknown_message(name))
        kept, num_open = self._models, self._open_by_model
        self._models = tuple(other for other in kept if other is not model)
        self._name_models()
        ends_s = time.monotonic() + timeout_s
        while num_open[name] and num_open is self._open_by_model:
            if time.monotonic() >= ends_s:
                self._models = (*self._models, model)
                self._name_models()
                raise OrderRefused(
                    f"the model {name!r} still has {num_open[name]} open requests after "
                    f"{timeout_s:g} s; it stays"
                )
            await asyncio.sleep(_DRAIN_INTERVAL_S)
        if num_open is self._open_by_model:  # not of another instance, started meanwhile
            del num_open[name]
            await _stop(self._running.pop(name, AsyncExitStack()))

    def refuse(self, why: Unavailable) -> None:
        """Answer new requests with `why`; the open ones go on."""
        self._down = why

    def report_stalled(self, why: Unavailable | None) -> None:
        """Have `/health` say `why`; requests are still taken in. None: that is over."""
        self._stalled = why

    def reconfigure(
        self, *, limits: Limits, admit: Admit | None, aliases: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Go by these from the next request on. aliases: model -> its names beside its own."""
        self._limits = limits
        self._admit = admit
        taken = {name for model in self._models for name in (model.name, *model.adapters)}
        renamed = []
        for model in self._models:
            wanted = aliases.get(model.name, model.aliases)
            free = tuple(alias for alias in wanted if alias not in taken)
            taken.update(free)
            renamed.append(replace(model, aliases=free))
            model.rename(free)
        self._models = tuple(renamed)
        self._name_models()

    def _name_models(self) -> None:
        self._by_name = {name: model for model in self._models for name in model.names}

    def num_open(self, model: str | None = None) -> int:
        """How many requests the application of `model` is answering; None: those of all."""
        return len(self._open) if model is None else self._open_by_model.get(model, 0)

    # -- ASGI ------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": "HTTP only"})
            return
        response = await self._answer(scope, receive, send)
        if response is not None:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The router's own answer; None when a model's application has answered."""
        method, path = scope["method"], scope["path"]
        if (
            self._api_keys is not None
            and path not in _OPEN_ROUTES
            and not self._api_keys.allow(_header(scope, "authorization"))
        ):
            return unauthorized()
        reads = method in ("GET", "HEAD")
        if reads and path in _OPEN_ROUTES:
            return await self._health()
        if reads and path == "/metrics":
            return await self._exposition()
        if reads and path == "/v1/models":
            return JSONResponse({"object": "list", "data": await self._cards()})
        if reads and path.startswith("/v1/models/"):
            return await self._card(path.removeprefix("/v1/models/"))
        if path not in MODEL_ROUTES:
            return error_response(404, f"there is no route {path}", code="not_found")
        if method != "POST":
            return error_response(
                405, f"{path} is reached by POST, not {method}", code="method_not_allowed"
            )
        return await self._dispatch(scope, receive, send)

    # -- one model's request ---------------------------------------------------------------

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        body = await self._read_body(scope, receive)
        if not isinstance(body, bytes):
            return body
        at_once = len(body) <= _PARSED_AT_ONCE_BYTES
        request = parsed(body) if at_once else await asyncio.to_thread(parsed, body)
        if isinstance(request, Response):
            return request
        if self._down is not None:
            return self._down.response()
        name = request["model"]
        model = self._by_name.get(name)
        if model is None:
            return self._unknown(name)
        note_model(scope, model.name)
        if (reason := self._failures().get(model.name)) is not None:
            return _out_of_service(name, reason)
        if (limited := self._limited(model)) is not None:
            return limited
        too_many = too_many_answers(self._limits.max_n, request)
        if too_many is not None:
            return too_many
        if scope["path"] in _TOKEN_ROUTES:
            try:
                wanted = objectives(_headers(scope), request)
            except BadObjective as error:
                return error_response(400, str(error), code="invalid_slo", param=error.param)
            refusal = await self._refusal(model, len(body), wanted)
            if refusal is not None:
                return refusal
            if wanted:
                changed = with_objectives(request, wanted)
                body = dumped(changed) if at_once else await asyncio.to_thread(dumped, changed)
                scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        # From here on nothing waits: what is found holds when the request is counted. Meanwhile the
        # model may have gone, or be that of another instance.
        if self._down is not None:
            return self._down.response()
        model = self._by_name.get(name)
        if model is None:
            return self._unknown(name)
        if (limited := self._limited(model)) is not None:
            return limited
        num_open = self._open_by_model  # of these models: after a restart there are others
        num_open[model.name] += 1
        open_request = OpenRequest(scope, receive, send)
        self._open.add(open_request)
        try:
            # The original `receive` goes on behind the body: a disconnect aborts the request.
            replayed = _replayed(body, receive)
            app = model.app
            await open_request.run(lambda relay: app(scope, replayed, relay))
        finally:
            self._open.discard(open_request)
            num_open[model.name] -= 1
        return None

    def _limited(self, model: ServedModel) -> Response | None:
        """When as many requests are open as may be."""
        if self._open_by_model[model.name] >= self._limits.max_open_requests:
            return error_response(
                429,
                f"{self._limits.max_open_requests} requests are open for the model "
                f"{model.name!r}; try again later",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                param="model",
                retry_after_s=1,
            )
        if len(self._open) >= self._limits.max_open_total:
            return error_response(
                503,
                f"{self._limits.max_open_total} requests are open; try again later",
                type="server_error",
                code="server_overloaded",
                retry_after_s=1,
            )
        return None

    async def _refusal(
        self, model: ServedModel, body_bytes: int, wanted: Mapping[str, float]
    ) -> Response | None:
        """Of a request whose first token would be late, when the pool refuses such."""
        if self._admit is None:
            return None
        try:
            wait_s = await self._admit(
                model.name, body_bytes // _BYTES_PER_TOKEN + 1, wanted.get("slo_ttft_ms")
            )
        except (AegaeonError, TimeoutError):
            return None  # whether the instance works is found out by the request itself
        if not wait_s:
            return None
        return error_response(
            429,
            f"the first token for the model {model.name!r} would be {wait_s:.1f} s late; "
            f"try again later, or ask for a longer x-slo-ttft-ms",
            type="rate_limit_error",
            code="deadline_cannot_be_met",
            param="model",
            retry_after_s=math.ceil(wait_s),
        )

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | Response | None:
        """The whole body; a refusal; or None when the client went away."""
        limit = self._limits.max_body_bytes
        too_large = error_response(
            413, f"the request body is longer than {limit} bytes", code="request_too_large"
        )
        declared = _header(scope, "content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            return too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                return too_large
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    # -- all models ------------------------------------------------------------------------

    async def _health(self) -> Response:
        why = self._down or self._stalled
        return Response(status_code=200) if why is None else why.response()

    async def _exposition(self) -> Response:
        try:
            return PlainTextResponse(await self._metrics())
        except (AegaeonError, TimeoutError):
            return (self._down or self._stalled or _NO_ANSWER).response()

    async def _cards(self) -> list[dict[str, Any]]:
        try:
            states = await self._states()
        except (AegaeonError, TimeoutError):
            states = {}  # the models are still those of the pool; their state is what nobody knows
        states = {**states, **dict.fromkeys(self._failures(), "failed")}
        return [
            {**card, "state": states.get(model.name, "unknown")}
            for model in self._models
            for card in await model.cards()
        ]

    async def _card(self, name: str) -> Response:
        for card in await self._cards():
            if card["id"] == name:
                return JSONResponse(card)
        return self._unknown(name)

    def _unknown_message(self, name: str) -> str:
        named = name if len(name) <= _SHOWN_NAME_CHARS else f"{name[:_SHOWN_NAME_CHARS]}..."
        return f"the model {named!r} does not exist; this server has: {', '.join(self._by_name)}"

    def _unknown(self, name: str) -> Response:
        return error_response(
            404,
            self._unknown_message(name),
            type="not_found_error",
            code="model_not_found",
            param="model",
        )


def _out_of_service(name: str, reason: str) -> Response:
    """The reason itself names files and addresses: it is in the log, and on the admin listener."""
    kind = reason.partition(":")[0]
    return error_response(
        503,
        f"the model {name!r} is out of service ({kind}); the others are served",
        type="server_error",
        code="model_out_of_service",
        param="model",
    )


def _headers(scope: Scope) -> dict[str, str]:
    """The first of each name."""
    return {
        key.decode("latin-1"): value.decode("latin-1") for key, value in reversed(scope["headers"])
    }


def _with_length(
    headers: Iterable[tuple[bytes, bytes]], num_bytes: int
) -> list[tuple[bytes, bytes]]:
    others = [(key, value) for key, value in headers if key != b"content-length"]
    return [*others, (b"content-length", b"%d" % num_bytes)]


def _header(scope: Scope, name: str) -> str | None:
    return _headers(scope).get(name)


def _replayed(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _stop(application: AsyncExitStack) -> None:
    try:
        await application.aclose()
    except Exception:
        # It is not used any more, and what comes after it shares nothing with it.
        logger.exception("an application failed to stop")


@asynccontextmanager
async def _running(app: AsgiApp) -> AsyncIterator[None]:
    """Start-up and shutdown of an application that has a router, as Starlette's have."""
    router = getattr(app, "router", None)
    if router is None:
        yield
        return
    async with router.lifespan_context(app):
        yield
