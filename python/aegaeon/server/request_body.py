"""The JSON body of a request: read once and strictly, before any model sees it."""

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.responses import Response

from aegaeon.server.errors import error_response

# Deeper nesting than any request needs; json's own limit would come much later.
_MAX_JSON_DEPTH = 64
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{\]}]')


def parsed(body: bytes) -> Mapping[str, Any] | Response:
    """The request in a JSON body, which names its `model`; or what is wrong with it."""
    if _nested_deeper_than(_MAX_JSON_DEPTH, body):
        return error_response(
            400, f"the body is nested deeper than {_MAX_JSON_DEPTH} levels", code="invalid_json"
        )
    try:
        request = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return error_response(400, f"the body is not valid JSON: {error}", code="invalid_json")
    if not isinstance(request, Mapping):
        return error_response(400, "the body must be a JSON object", code="invalid_json")
    name = request.get("model")
    if not isinstance(name, str) or not name:
        return error_response(
            400, 'the body must name a model: "model": "..."', code="missing_model", param="model"
        )
    return request


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: which of two counts is for nobody to guess."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def too_many_answers(limit: int, request: Mapping[str, Any]) -> Response | None:
    """The refusal of a request that asks for more than `limit` answers at once."""
    for key in ("n", "best_of"):
        value = request.get(key)
        if isinstance(value, int) and value > limit:
            return error_response(
                400,
                f"{key}: got {_shortened(value)}; expected at most {limit}",
                code="too_many_answers",
                param=key,
            )
    return None


def _shortened(value: int) -> str:
    return str(value) if value.bit_length() < 64 else "a very large number"


def dumped(request: Mapping[str, Any]) -> bytes:
    """The body of a request that was changed."""
    return json.dumps(request).encode()


def _nested_deeper_than(limit: int, body: bytes) -> bool:
    """Brackets outside of strings, counted before anything is built from them."""
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(body):
        match token[0]:
            case b"[" | b"{":
                depth += 1
                if depth > limit:
                    return True
            case b"]" | b"}":
                depth -= 1
    return False
