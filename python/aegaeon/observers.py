"""Who is told of every request: metrics, the log, and traces when a collector is named."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from aegaeon.core.clock import MonotonicClock
from aegaeon.core.config import ObservabilityConfig
from aegaeon.core.errors import AegaeonError
from aegaeon.server.admin import Ask
from aegaeon.server.app import route_of
from aegaeon.server.metrics import FrontMetrics
from aegaeon.server.observed import Observed
from aegaeon.server.request_log import RequestLog

if TYPE_CHECKING:
    from aegaeon.server.tracing import RequestTraces

logger = logging.getLogger(__name__)


class Observers:
    """ask: the instance, of which traces want to know the switches.

    Raises AegaeonError when traces are wanted and OpenTelemetry is not installed.
    """

    def __init__(self, config: ObservabilityConfig, metrics: FrontMetrics, ask: Ask) -> None:
        self._log = RequestLog(every=config.log_requests)
        self._metrics = metrics
        self._traces = None if config.otlp_endpoint is None else _traces(config, ask)

    def around(self, app: ASGIApp) -> Observed:
        """`app`, observed."""
        ended = [self._metrics.ended, self._log.ended]
        return Observed(
            app, clock=MonotonicClock(), route_of=route_of, ended=ended, traces=self._traces
        )

    async def close(self) -> None:
        """Give the last traces to the collector; at most a few seconds."""
        if self._traces is not None:
            await self._traces.close()


def _traces(config: ObservabilityConfig, ask: Ask) -> "RequestTraces":
    assert config.otlp_endpoint is not None
    try:
        from aegaeon.server.tracing import RequestTraces, otlp_provider

        provider = otlp_provider(config.otlp_endpoint, sample_share=config.trace_sample)
    except ModuleNotFoundError as error:
        raise AegaeonError(
            f"observability.otlp_endpoint needs OpenTelemetry's SDK and its exporter for OTLP over "
            f"HTTP: {error}"
        ) from None

    async def switches(since: float) -> Sequence[Mapping[str, Any]]:
        records: list[dict[str, Any]] = await ask("switches", since=since)
        return records

    logger.info("traces go to %s", config.otlp_endpoint)
    return RequestTraces(provider, switches)
