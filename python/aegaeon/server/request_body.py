"""The JSON body of a request: read once and strictly, before any model sees it."""

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.responses import Response

from aegaeon.server.errors import error_response

# Deeper nesting than any request needs; json's own limit would come much later.
_MAX_JSON_DEPTH = 64
# Possessive, and a string that does not end is one to the end of the body: each byte is looked at
# once, whatever the body is.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+\\?"?|[\[{\]}]', re.DOTALL)

# How many answers one request may ask for over all of its prompts, if `server.max_n` is not more.
MAX_ANSWERS = 256
# How many texts one request may have embedded, scored or classified: as OpenAI's API allows.
MAX_TEXTS = 2048
_GENERATED_FROM = ("prompt", "prompt_embeds")
# Each of these is one text, one conversation, or a list of such.
_POOLED_FROM = ("input", "messages")
# Each element of these is a text, whatever its form.
_TEXTS = (
    *("texts", "images", "inputs", "documents", "queries", "items"),
    *("data_1", "data_2", "text_1", "text_2"),
)
_JSON_TYPES = {
    bool: "a boolean",
    float: "a number with a fraction or an exponent",
    str: "a string",
    list: "a list",
    dict: "an object",
}


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
    """The refusal of a request for more than `limit` answers to a prompt, or of too many prompts.

    What is too many: see MAX_ANSWERS and MAX_TEXTS. A number of answers that is not an integer is
    refused too: vLLM would take "1000" and 1000.0 for one.
    """
    answers = 1
    for key in ("n", "best_of"):
        value = request.get(key)
        if value is None:
            continue
        if type(value) is not int:
            return error_response(
                400,
                f"{key}: got {_JSON_TYPES[type(value)]}; expected an integer",
                code="not_an_integer",
                param=key,
            )
        if value > limit:
            return error_response(
                400,
                f"{key}: got {_shortened(value)}; expected at most {limit}",
                code="too_many_answers",
                param=key,
            )
        answers = max(answers, value)
    return _too_many_prompts(max(limit, MAX_ANSWERS), answers, request)


def _too_many_prompts(limit: int, answers: int, request: Mapping[str, Any]) -> Response | None:
    for key in _GENERATED_FROM:
        count = _num_prompts(request.get(key))
        if count * answers > limit:
            each = f" with {answers} answers each" if answers > 1 else ""
            return error_response(
                400,
                f"{key}: got {count} prompts{each}; expected at most {limit} answers in one "
                f"request: send several requests",
                code="too_many_prompts",
                param=key,
            )
    for key in (*_POOLED_FROM, *_TEXTS):
        value = request.get(key)
        count = _num_prompts(value)
        if key in _TEXTS and isinstance(value, list):
            count = len(value)
        if count > MAX_TEXTS:
            return error_response(
                400,
                f"{key}: got {count} texts; expected at most {MAX_TEXTS} in one request: send "
                f"several requests",
                code="too_many_prompts",
                param=key,
            )
    return None


def _num_prompts(value: object) -> int:
    """A list of texts or of lists is several; one of token ids or of messages is one.

    The first element decides: vLLM refuses a list that mixes them.
    """
    several = isinstance(value, list) and value and isinstance(value[0], str | list)
    return len(value) if isinstance(value, list) and several else 1


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
