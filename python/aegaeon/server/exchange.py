"""One HTTP exchange on its way through the server: what metrics, logs and traces know of it.

Never a prompt, an answer, a key or a header's value other than the request's id.
"""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OTHER = "_OTHER"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_KEY = "aegaeon.exchange"
# What a client may choose as the id of its request; it is written to logs, and vLLM makes it a part
# of its own ids.
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass
class Exchange:
    """Times are seconds of the monotonic clock.

    method, route: of fixed lists, `_OTHER` for anything else: a client's text goes nowhere.
    model: the pool's name of it, once it is known. error_code: why this server (not the model's
    application) refused. first_s: when the first byte of the answer's body went out; for a
    streamed answer that is about the first token.
    """

    id: str
    method: str
    route: str
    began_s: float
    model: str | None = None
    error_code: str | None = None
    status: int | None = None
    first_s: float | None = None
    ended_s: float | None = None


def open_exchange(
    scope: Any, *, route: str | None, request_id: str | None, began_s: float
) -> Exchange:
    """Begin one and leave it in `scope`. route: None: no known one. request_id: the client's."""
    if request_id is None or not _CLIENT_ID.fullmatch(request_id):
        request_id = uuid.uuid4().hex
    method = scope["method"] if scope["method"] in _METHODS else OTHER
    exchange = Exchange(request_id, method, route or OTHER, began_s)
    scope[_KEY] = exchange
    return exchange


def exchange_of(scope: Mapping[str, Any]) -> Exchange | None:
    """That of a request; None where nobody observes."""
    found = scope.get(_KEY)
    return found if isinstance(found, Exchange) else None


def note_model(scope: Mapping[str, Any], model: str) -> None:
    """The request is for `model`."""
    exchange = exchange_of(scope)
    if exchange is not None:
        exchange.model = model


def note_error(scope: Mapping[str, Any], code: str | None) -> None:
    """The server refuses the request itself."""
    exchange = exchange_of(scope)
    if exchange is not None:
        exchange.error_code = code or "other"
