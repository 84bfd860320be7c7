"""Prometheus metrics of the front: answers by status, and what it refuses itself.

Labels come from the pool's names and from fixed lists, never from what a client sends.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from aegaeon.server.exchange import Exchange

# A client that went away before it was answered.
NO_STATUS = "none"


class FrontMetrics:
    """models: the pool's names, in its order. num_open: how many requests a model's application is
    answering now. instance: whether it serves, and how often it has been started anew. `ended` is
    to be told of every exchange.
    """

    def __init__(
        self,
        models: Sequence[str],
        num_open: Callable[[str], int],
        instance: Callable[[], tuple[bool, int]] = lambda: (True, 0),
    ) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "aegaeon_http_requests",
            "HTTP requests by model ('' when none is known) and status of the answer.",
            ("model_name", "status"),
            registry=self._registry,
        )
        self._refused = Counter(
            "aegaeon_requests_refused",
            "Requests that the server refused itself, by the code in the error.",
            ("model_name", "reason"),
            registry=self._registry,
        )
        self._open = Gauge(
            "aegaeon_open_requests",
            "Requests that a model's application is answering.",
            ("model_name",),
            registry=self._registry,
        )
        self._registry.register(_InstanceCollector(instance))
        self._models: list[str] = []
        self._num_open = num_open
        for name in models:
            self.add(name)

    def add(self, model: str) -> None:
        """Report on one more model."""
        self._models.append(model)
        self._open.labels(model).set_function(partial(self._num_open, model))
        for reason in ("rate_limit_exceeded", "deadline_cannot_be_met"):
            self._refused.labels(model, reason)

    def remove(self, model: str) -> None:
        """Forget all about a model."""
        self._models.remove(model)
        for metric in (self._open, self._refused, self._answers):
            metric.remove_by_labels({"model_name": model})

    def ended(self, exchange: Exchange) -> None:
        """An exchange is over."""
        model = exchange.model or ""
        status = NO_STATUS if exchange.status is None else str(exchange.status)
        self._answers.labels(model, status).inc()
        if exchange.error_code is not None:
            self._refused.labels(model, exchange.error_code).inc()

    def snapshot(self) -> dict[str, Any]:
        """As plain values, for the admin interface."""
        return {
            "open": {name: self._num_open(name) for name in self._models},
            "refused": [
                {"model": sample.labels["model_name"], "reason": sample.labels["reason"]}
                | {"count": int(sample.value)}
                for family in self._refused.collect()
                for sample in family.samples
                if sample.name.endswith("_total") and sample.value
            ],
        }

    def exposition(self) -> str:
        return generate_latest(self._registry).decode()


class _InstanceCollector(Collector):
    def __init__(self, instance: Callable[[], tuple[bool, int]]) -> None:
        self._instance = instance

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        up, num_restarts = self._instance()
        yield GaugeMetricFamily(
            "aegaeon_instance_up",
            "1 while the instance serves; while it is 0 the metrics of the instance are missing.",
            value=float(up),
        )
        yield CounterMetricFamily(
            "aegaeon_instance_restarts",
            "How often an instance was started in the place of one that had died.",
            value=num_restarts,
        )
