"""Traces of requests with their switches: a real router and real SDK, spans kept in memory."""

import asyncio
import subprocess
import sys
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from aegaeon.core.clock import MonotonicClock
from aegaeon.core.config import ObservabilityConfig, PoolConfig
from aegaeon.core.errors import InstanceDied
from aegaeon.server.app import route_of
from aegaeon.server.exchange import note_error, note_model
from aegaeon.server.observed import Observed
from aegaeon.server.tracing import MAX_SWITCH_SPANS, RequestTraces

PATH = "/v1/completions"
PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


class Traced:
    """A small application of which every request goes to model `a`, and its spans."""

    def __init__(self, *, switches: int = 0, dead: bool = False, **provider: Any) -> None:
        self.exporter = InMemorySpanExporter()
        made = TracerProvider(**provider)
        made.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = RequestTraces(made, self._switches)
        self._num_switches, self._dead = switches, dead
        self.clock = MonotonicClock()
        app = Starlette(routes=[Route(PATH, self._complete, methods=["POST"])])
        self.app = Observed(app, clock=self.clock, route_of=route_of, traces=self.traces)

    async def _complete(self, request: Request) -> JSONResponse:
        body = await request.json()
        if body["model"] != "a":
            note_error(request.scope, "model_not_found")
            return JSONResponse({}, status_code=404)
        note_model(request.scope, "a")
        await asyncio.sleep(0.01)
        status = body.get("status", 200)
        return JSONResponse({"traceparent": request.headers["traceparent"]}, status_code=status)

    async def _switches(self, since: float) -> list[dict[str, Any]]:
        if self._dead:
            raise InstanceDied("host", -9)
        return [
            {
                "model": "a" if number % 2 else "b",
                "path": "warm",
                "at": since + number * 1e-6,
                "seconds": 0.001,
                "bytes_in": 7,
                "bytes_out": 0,
                "evicted": ["b"],
                **{f"{phase}_s": 0.00025 for phase in ("save", "unmap", "map", "load")},
            }
            for number in range(self._num_switches)
        ]

    def ask(self, path: str = PATH, **options: Any) -> httpx.Response:
        """POST, and wait until the spans are exported."""

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
                response = await client.post(path, **options)
            await self.traces.close()
            return response

        return asyncio.run(run())

    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


def test_a_request_and_its_switches_are_one_trace():
    traced = Traced(switches=2)
    response = traced.ask(json={"model": "a", "prompt": "a secret"}, headers={"x-request-id": "r1"})
    spans = traced.spans()
    request = spans[f"POST {PATH}"]
    assert request.kind is SpanKind.SERVER
    attributes = dict(request.attributes)
    assert 0 < attributes.pop("aegaeon.first_byte_seconds") < 5
    assert attributes == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "gen_ai.request.model": "a",
        "aegaeon.request_id": "r1",
        "aegaeon.switches": 2,
        "aegaeon.switches_to_model": 1,
        "aegaeon.switch_seconds": 0.002,
    }
    for name in ("switch to a", "switch to b"):
        child = spans[name]
        assert child.parent.span_id == request.context.span_id
        assert child.attributes["aegaeon.path"] == "warm"
        assert request.start_time <= child.start_time + 10_000_000
        assert child.end_time - child.start_time == pytest.approx(1e6, abs=2e5)
    assert [event.name for event in request.events] == ["first byte"]
    # vLLM's own spans, where it is told to make any, go below ours.
    assert format(request.context.span_id, "016x") in response.json()["traceparent"]
    assert "secret" not in str([span.to_json() for span in spans.values()])


def test_a_trace_of_the_client_goes_on():
    traced = Traced()
    traced.ask(json={"model": "a"}, headers={"traceparent": PARENT})
    (request,) = traced.spans().values()
    assert format(request.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(request.parent.span_id, "016x") == PARENT.split("-")[2]
    unsampled = Traced()
    unsampled.ask(json={"model": "a"}, headers={"traceparent": PARENT[:-1] + "0"})
    assert unsampled.spans() == {}


def test_a_long_request_has_the_switches_to_its_own_model_first_and_not_all():
    traced = Traced(switches=3 * MAX_SWITCH_SPANS)
    traced.ask(json={"model": "a"})
    spans = traced.exporter.get_finished_spans()
    children = [span.name for span in spans if span.name.startswith("switch")]
    assert children == ["switch to a"] * MAX_SWITCH_SPANS
    (request,) = (span for span in spans if span.kind is SpanKind.SERVER)
    assert request.attributes["aegaeon.switches"] == 3 * MAX_SWITCH_SPANS


def test_refusals_faults_and_a_dead_instance_end_their_spans_too():
    refused = Traced()
    refused.ask(json={"model": "x"})
    (span,) = refused.spans().values()
    assert span.attributes["error.type"] == "model_not_found"
    assert span.status.status_code is StatusCode.UNSET
    failed = Traced(dead=True)
    failed.ask(json={"model": "a", "status": 503})
    (span,) = failed.spans().values()
    assert span.status.status_code is StatusCode.ERROR
    unknown = Traced()
    unknown.ask("/secret/path", json={"model": "x"})
    assert list(unknown.spans()) == ["POST _OTHER"]


def test_what_is_not_sampled_asks_for_no_switches():
    traced = Traced(dead=True, sampler=ALWAYS_OFF)
    assert traced.ask(json={"model": "a"}).status_code == 200
    assert traced.spans() == {}


def test_traces_are_off_unless_a_collector_is_named():
    assert PoolConfig.model_fields["observability"].default == ObservabilityConfig()
    assert ObservabilityConfig().otlp_endpoint is None
    program = """
import sys
import aegaeon.launch
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "file:///etc/passwd", "http://", ""])
def test_a_collector_is_an_http_address(endpoint):
    with pytest.raises(ValueError, match="otlp_endpoint"):
        ObservabilityConfig(otlp_endpoint=endpoint)
