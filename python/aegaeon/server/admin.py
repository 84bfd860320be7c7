"""The admin listener's application: what the instance does, and orders to it. Never on the public
address.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aegaeon.core.errors import (
    AegaeonError,
    CapacityError,
    ConfigError,
    ModelLoadError,
    OrderRefused,
    UnknownModel,
)
from aegaeon.server.dashboard import dashboard
from aegaeon.server.errors import error_response

VERBS = ("load", "unload", "pin", "unpin")
_INTERVAL_S = (0.1, 60.0)
_DRAIN_S = (0.0, 3600.0)
_PARTS = frozenset({"switches", "timeline"})


class Ask(Protocol):
    """A question or an order to the instance, and its answer.

    timeout_s: None waits for as long as the instance lives; without it a few seconds.
    Raises InstanceDied when it is gone, TimeoutError, UnknownModel, OrderRefused, AegaeonError.
    """

    async def __call__(
        self, question: str, *, timeout_s: float | None = ..., **arguments: Any
    ) -> Any: ...


class Models(Protocol):
    """Which models the server has. Raises as Ask does, and ConfigError, CapacityError,
    ModelLoadError for what is added.
    """

    async def add(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """entry: as in the pool file, its paths absolute."""

    async def remove(self, name: str, *, timeout_s: float) -> None: ...


class _Fixed:
    """Models that neither come nor go."""

    async def add(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        raise OrderRefused("the models of this server cannot be changed")

    async def remove(self, name: str, *, timeout_s: float) -> None:
        raise OrderRefused("the models of this server cannot be changed")


def admin_app(
    ask: Ask,
    front: Callable[[], dict[str, Any]] = dict,
    models: Models | None = None,
    *,
    closing: asyncio.Event | None = None,
) -> Starlette:
    """Routes over the instance that `ask` reaches.

    front: the front's own part of the state. models: None: those there are stay.
    closing: when it is set, streams of events end, which else keep the server from its end.
    """
    closing = closing or asyncio.Event()
    changeable = models or _Fixed()

    async def full_state() -> dict[str, Any]:
        return {**await ask("state"), "front": front()}

    async def state(request: Request) -> Response:
        """Models, their residency, queues and SLOs, who holds the arena, totals."""
        return JSONResponse(await full_state())

    async def timeline(request: Request) -> Response:
        """Who had the device in the last two minutes, in slices."""
        return JSONResponse(await ask("timeline"))

    async def switches(request: Request) -> Response:
        """The last switches with their times and bytes, oldest first."""
        return JSONResponse(await ask("switches"))

    async def events(request: Request) -> Response:
        """The state and what is new since the last time, every `interval_s`, as SSE.

        `with`: switches, timeline, or both, with a comma; without it switches.
        """
        interval_s = _number(request, "interval_s", 1.0)
        news = News(ask, full_state, _parts(request))
        # Asked for once before the answer begins: an instance that is gone is a status.
        first = await news.next()
        return StreamingResponse(
            _events(news, first, interval_s, closing),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    async def order(request: Request) -> Response:
        """Have the instance load, unload, pin or unpin a model, between two steps."""
        verb = request.url.path.rpartition("/")[2]
        name = request.path_params["name"]
        return JSONResponse(await ask(verb, timeout_s=None, model=name))

    async def add(request: Request) -> Response:
        """Load one more model, given as in the pool file, and serve it."""
        try:
            entry = await request.json()
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from None
        if not isinstance(entry, dict):
            raise HTTPException(400, "the body must be a JSON object: a model as in the pool file")
        return JSONResponse(await changeable.add(entry), status_code=201)

    async def remove(request: Request) -> Response:
        """Stop serving a model when its open requests have ended, at most in `timeout_s`."""
        name = request.path_params["name"]
        timeout_s = _number(request, "timeout_s", 30.0, _DRAIN_S)
        await changeable.remove(name, timeout_s=timeout_s)
        return JSONResponse({"name": name, "removed": True})

    async def sleep(request: Request) -> Response:
        """vLLM's: here the model leaves the device; its next request brings it back."""
        level = request.query_params.get("level", "1")
        if level not in ("0", "1", "2"):
            raise HTTPException(400, f"level: got {level!r}; expected 0, 1 or 2")
        await ask("unload", timeout_s=None, model=await _model(request, ask))
        return JSONResponse({"status": "sleeping", "level": int(level)})

    async def wake_up(request: Request) -> Response:
        """vLLM's: the model is brought onto the device, whatever `tags` say."""
        await ask("load", timeout_s=None, model=await _model(request, ask))
        return JSONResponse({"status": "awake", "tags": request.query_params.getlist("tags")})

    async def is_sleeping(request: Request) -> Response:
        name = await _model(request, ask)
        models = (await ask("state"))["models"]
        found = next((model for model in models if model["name"] == name), None)
        if found is None:
            names = ", ".join(model["name"] for model in models)
            raise UnknownModel(f"the model {name!r} does not exist; this server has: {names}")
        return JSONResponse({"is_sleeping": found["state"] != "resident"})

    return Starlette(
        routes=[
            Route("/dashboard", dashboard, methods=["GET"]),
            Route("/admin/state", state, methods=["GET"]),
            Route("/admin/switches", switches, methods=["GET"]),
            Route("/admin/timeline", timeline, methods=["GET"]),
            Route("/admin/events", events, methods=["GET"]),
            *(
                Route(f"/admin/models/{{name:path}}/{verb}", order, methods=["POST"])
                for verb in VERBS
            ),
            Route("/admin/models", add, methods=["POST"]),
            Route("/admin/models/{name:path}", remove, methods=["DELETE"]),
            Route("/sleep", sleep, methods=["POST"]),
            Route("/wake_up", wake_up, methods=["POST"]),
            Route("/is_sleeping", is_sleeping, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: _http_error,
            AegaeonError: _own_error,
            TimeoutError: _no_answer,
        },
    )


async def _model(request: Request, ask: Ask) -> str:
    """The query's `model`; without one the pool's only model."""
    name = request.query_params.get("model")
    if name is not None:
        return name
    models: Sequence[dict[str, Any]] = (await ask("state"))["models"]
    if len(models) != 1:
        names = ", ".join(model["name"] for model in models)
        raise HTTPException(400, f"the query must name a model, as in ?model=NAME; one of: {names}")
    return str(models[0]["name"])


def _number(
    request: Request, name: str, default: float, limits: tuple[float, float] = _INTERVAL_S
) -> float:
    low, high = limits
    given = request.query_params.get(name, str(default))
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise HTTPException(400, f"{name}: got {given!r}; expected {low:g} to {high:g}")
    return value


def _parts(request: Request) -> frozenset[str]:
    given = request.query_params.get("with", "switches")
    parts = frozenset(given.split(",")) - {""}
    if not parts <= _PARTS:
        raise HTTPException(
            400, f"with: got {given!r}; expected any of: {', '.join(sorted(_PARTS))}"
        )
    return parts


class News:
    """What one listener of `/admin/events` has not heard yet. parts: switches, timeline."""

    def __init__(
        self, ask: Ask, state: Callable[[], Awaitable[dict[str, Any]]], parts: frozenset[str]
    ) -> None:
        self._ask = ask
        self._state = state
        self._parts = parts
        self._since: float | None = None
        self._slice = 0

    async def next(self) -> dict[str, Any]:
        """The state, and of each part what is new; the last slice of a timeline comes again."""
        news: dict[str, Any] = {"state": await self._state()}
        if "switches" in self._parts:
            news["switches"] = await self._ask("switches", since=self._since)
            if news["switches"]:
                self._since = news["switches"][-1]["at"]
        if "timeline" in self._parts:
            news["timeline"] = await self._ask("timeline", since=self._slice)
            if news["timeline"]["slices"]:
                self._slice = news["timeline"]["slices"][-1]["number"]
        return news


async def _events(
    news: News, first: dict[str, Any], interval_s: float, closing: asyncio.Event
) -> AsyncIterator[str]:
    snapshot: dict[str, Any] | None = first
    while True:
        if snapshot is not None:
            yield f"event: snapshot\ndata: {json.dumps(snapshot)}\n\n"
        with suppress(TimeoutError):
            await asyncio.wait_for(closing.wait(), interval_s)
            return
        try:
            snapshot = await news.next()
        except (AegaeonError, TimeoutError) as error:
            reason = str(error) or "the instance does not answer"
            yield f"event: error\ndata: {json.dumps({'message': reason})}\n\n"
            snapshot = None


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405) and not error.detail.startswith("the "):
        detail = f"there is no {request.method} {request.url.path}"
    else:
        detail = error.detail
    code = "not_found" if error.status_code == 404 else None
    return error_response(error.status_code, detail, code=code)


async def _own_error(request: Request, error: Exception) -> Response:
    if isinstance(error, UnknownModel):
        return error_response(
            404, str(error), type="not_found_error", code="model_not_found", param="model"
        )
    if isinstance(error, ConfigError | ModelLoadError):
        return error_response(400, str(error), code="invalid_model")
    if isinstance(error, OrderRefused | CapacityError):
        return error_response(409, str(error), type="conflict_error", code="refused")
    return error_response(
        503, str(error), type="server_error", code="instance_down", retry_after_s=1
    )


async def _no_answer(request: Request, error: Exception) -> Response:
    return error_response(
        503,
        "the instance does not answer",
        type="server_error",
        code="instance_down",
        retry_after_s=1,
    )
