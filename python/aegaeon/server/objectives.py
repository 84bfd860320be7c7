"""A request's own SLO: HTTP headers become what vLLM carries to the engine (`vllm_xargs`)."""

from collections.abc import Mapping
from typing import Any

from aegaeon.core.slo import SLO_HEADERS, objective_ms


class BadObjective(ValueError):
    """A client's SLO is not a time; `param` names where it stands."""

    def __init__(self, param: str, value: object) -> None:
        super().__init__(f"{param}: expected milliseconds above 0, got {value!r}")
        self.param = param


def objectives(headers: Mapping[str, str], request: Mapping[str, Any]) -> dict[str, float]:
    """What the client asks for, by the names of `SLO_HEADERS`' values; headers before the body.

    Raises BadObjective.
    """
    body = request.get("vllm_xargs")
    body = body if isinstance(body, Mapping) else {}
    found: dict[str, float] = {}
    for header, name in SLO_HEADERS.items():
        where, value = (header, headers[header]) if header in headers else (name, body.get(name))
        if value is None:
            continue
        milliseconds = objective_ms(value)
        if milliseconds is None:
            raise BadObjective(where, value)
        found[name] = milliseconds
    return found


def with_objectives(request: Mapping[str, Any], found: Mapping[str, float]) -> dict[str, Any]:
    """The request with these in its `vllm_xargs`, beside what is there."""
    body = request.get("vllm_xargs")
    return {**request, "vllm_xargs": {**(body if isinstance(body, Mapping) else {}), **found}}
