"""The admin listener's application: what the instance is doing. Never on the public address."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


def admin_app(ask: Callable[[str], Awaitable[Any]]) -> Starlette:
    """Routes over `ask(question)`, which the instance answers."""

    async def state(request: Request) -> JSONResponse:
        """Models, their residency, who holds the arena, totals."""
        return JSONResponse(await ask("state"))

    async def switches(request: Request) -> JSONResponse:
        """The last switches with their times and bytes, oldest first."""
        return JSONResponse(await ask("switches"))

    return Starlette(
        routes=[
            Route("/admin/state", state, methods=["GET"]),
            Route("/admin/switches", switches, methods=["GET"]),
        ]
    )
