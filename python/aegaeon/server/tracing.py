"""OpenTelemetry traces: a span per request, and below it the switches that happened meanwhile.

Off unless an endpoint is configured; nothing of OpenTelemetry is imported before that. Attributes
hold names, times and sizes, never a prompt or an answer.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from aegaeon.core.errors import AegaeonError
from aegaeon.server.exchange import Exchange

logger = logging.getLogger(__name__)

# Of a request's switches, so that a long one does not fill the collector; the sums count all.
MAX_SWITCH_SPANS = 64
# Lets the collector have the last spans, without keeping a server from its end.
CLOSE_TIMEOUT_S = 2.0

_PROPAGATOR = TraceContextTextMapPropagator()
_PHASES = ("save", "unmap", "map", "load")


class RequestTraces:
    """Spans of requests to models, given to `provider`.

    switches: (since, on the monotonic clock) -> records of the switches after it. `began` is to be
    told of every exchange, and `ended` too, on the event loop.
    """

    def __init__(
        self,
        provider: TracerProvider,
        switches: Callable[[float], Awaitable[Sequence[Mapping[str, Any]]]],
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("aegaeon")
        self._switches = switches
        self._spans: dict[int, Span] = {}  # by the exchange's identity: ids are the clients'
        self._closing: set[asyncio.Task[None]] = set()

    def began(self, exchange: Exchange, headers: Mapping[str, str]) -> dict[str, str]:
        """Open the span, below the client's when `headers` name one; returns the headers with which
        the model's application goes on with the trace.
        """
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            context=_PROPAGATOR.extract(headers),
            kind=SpanKind.SERVER,
            start_time=_wall_ns(exchange.began_s),
        )
        self._spans[id(exchange)] = span
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        return carrier

    def ended(self, exchange: Exchange) -> None:
        """Close the span; the switches are asked for meanwhile, so the client does not wait."""
        span = self._spans.pop(id(exchange))
        if not span.is_recording():
            span.end()
            return
        task = asyncio.get_running_loop().create_task(self._finish(exchange, span))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Give what is there to the collector; at most CLOSE_TIMEOUT_S."""
        if self._closing:
            await asyncio.wait(self._closing, timeout=CLOSE_TIMEOUT_S / 2)
        # A collector that does not answer is left behind in its thread.
        flushing = asyncio.get_running_loop().run_in_executor(None, self._provider.shutdown)
        await asyncio.wait({flushing}, timeout=CLOSE_TIMEOUT_S)

    async def _finish(self, exchange: Exchange, span: Span) -> None:
        assert exchange.ended_s is not None
        span.set_attributes(_attributes(exchange))
        if exchange.first_s is not None:
            span.add_event("first byte", timestamp=_wall_ns(exchange.first_s))
        if exchange.status is None or exchange.status >= 500:
            span.set_status(StatusCode.ERROR)
        if exchange.model is not None:
            # An instance that is gone has no switches to tell of; the span still ends.
            with suppress(AegaeonError, TimeoutError):
                self._add_switches(exchange, span, await self._switches(exchange.began_s))
        span.end(_wall_ns(exchange.ended_s))

    def _add_switches(
        self, exchange: Exchange, span: Span, records: Sequence[Mapping[str, Any]]
    ) -> None:
        assert exchange.ended_s is not None
        during = [record for record in records if record["at"] <= exchange.ended_s]
        mine = [record for record in during if record["model"] == exchange.model]
        span.set_attributes(
            {
                "aegaeon.switches": len(during),
                "aegaeon.switches_to_model": len(mine),
                "aegaeon.switch_seconds": sum(record["seconds"] for record in during),
            }
        )
        # Those that brought the request's own model in first: it waited for them.
        others = [record for record in during if record["model"] != exchange.model]
        context = trace.set_span_in_context(span)
        for record in [*mine, *others][:MAX_SWITCH_SPANS]:
            child = self._tracer.start_span(
                f"switch to {record['model']}",
                context=context,
                start_time=_wall_ns(record["at"]),
                attributes={
                    "aegaeon.model": record["model"],
                    "aegaeon.path": record["path"],
                    "aegaeon.bytes_in": record["bytes_in"],
                    "aegaeon.bytes_out": record["bytes_out"],
                    "aegaeon.evicted": list(record["evicted"]),
                    **{f"aegaeon.{phase}_seconds": record[f"{phase}_s"] for phase in _PHASES},
                },
            )
            child.end(_wall_ns(record["at"] + record["seconds"]))


def otlp_provider(endpoint: str, *, sample_share: float) -> TracerProvider:
    """Sends spans to the OTLP/HTTP collector at `endpoint` (such as http://127.0.0.1:4318).

    Raises ModuleNotFoundError without opentelemetry's exporter.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        resource=Resource.create({"service.name": "aegaeon"}),
        sampler=ParentBased(TraceIdRatioBased(sample_share)),
        shutdown_on_exit=False,
    )
    address = f"{endpoint.rstrip('/')}/v1/traces"
    exporter = OTLPSpanExporter(endpoint=address, timeout=CLOSE_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _attributes(exchange: Exchange) -> dict[str, str | int | float]:
    found = {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "gen_ai.request.model": exchange.model,
        "error.type": exchange.error_code,
        "aegaeon.request_id": exchange.id,
        "aegaeon.first_byte_seconds": exchange.first_s and exchange.first_s - exchange.began_s,
    }
    return {key: value for key, value in found.items() if value is not None}


def _wall_ns(monotonic_s: float) -> int:
    """What the wall clock showed then, by what it shows now."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)
