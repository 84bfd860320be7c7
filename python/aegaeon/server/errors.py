"""Errors in OpenAI's shape, as every client of the API expects them."""

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from aegaeon.server.exchange import note_error


class ErrorResponse(JSONResponse):
    """A refusal of the server's own; the exchange learns its code when it is sent."""

    def __init__(
        self, body: dict[str, Any], *, status: int, headers: dict[str, str], code: str | None
    ) -> None:
        super().__init__(body, status_code=status, headers=headers)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_error(scope, self._code)
        await super().__call__(scope, receive, send)


def error_response(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    retry_after_s: int | None = None,
) -> JSONResponse:
    """`{"error": {message, type, param, code}}` with `status`; retry_after_s: a header, >= 1."""
    headers = {} if retry_after_s is None else {"Retry-After": str(max(1, retry_after_s))}
    body = {"error": {"message": message, "type": type, "param": param, "code": code}}
    return ErrorResponse(body, status=status, headers=headers, code=code)
