"""Errors in OpenAI's shape, as every client of the API expects them."""

from starlette.responses import JSONResponse


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
    return JSONResponse(body, status_code=status, headers=headers)
