"""Prometheus metrics of the step loop and of the SLOs; read when scraped, from any thread."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from aegaeon.sched.meter import Meter
from aegaeon.sched.step_loop import StepLoop


class LoopCollector(Collector):
    """meters: by model, in the pool's order; another thread may add and remove some."""

    def __init__(self, loop: StepLoop, meters: Mapping[str, Meter]) -> None:
        self._loop = loop
        self._meters = meters

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        yield from self._loop_families()
        yield from self._slo_families()

    def _loop_families(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        counters = self._loop.counters
        yield CounterMetricFamily(
            "aegaeon_loop_decisions",
            "Times that the policy was asked which model runs next.",
            value=counters.decisions,
        )
        yield CounterMetricFamily(
            "aegaeon_loop_flushes",
            "Reports of finished requests, for which no model was switched.",
            value=counters.flushes,
        )
        turns = CounterMetricFamily(
            "aegaeon_loop_turns", "Turns of a model.", labels=["model_name"]
        )
        steps = CounterMetricFamily(
            "aegaeon_loop_steps", "Engine steps of a model.", labels=["model_name"]
        )
        device = CounterMetricFamily(
            "aegaeon_device_seconds",
            "Time of the device by what it went into; the rest of the wall clock it was idle.",
            labels=["model_name", "activity"],
        )
        usage = self._loop.usage.totals()
        for name in list(self._meters):
            if name in usage:
                turns.add_metric([name], usage[name].turns)
                steps.add_metric([name], usage[name].steps)
                device.add_metric([name, "switch"], usage[name].switch_s)
                device.add_metric([name, "step"], usage[name].step_s)
            else:
                turns.add_metric([name], 0)
                steps.add_metric([name], 0)
        yield turns
        yield steps
        yield device
        queue = GaugeMetricFamily(
            "aegaeon_queue_requests",
            "Open requests of a model in its engine: running, or waiting for their first token.",
            labels=["model_name", "state"],
        )
        for name, load in self._loop.loads().items():
            queue.add_metric([name, "running"], load.num_running)
            queue.add_metric([name, "waiting"], load.num_waiting)
        yield queue

    def _slo_families(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        tokens = CounterMetricFamily(
            "aegaeon_slo_tokens",
            "Tokens by whether they met their deadline.",
            labels=["model_name", "result"],
        )
        requests = CounterMetricFamily(
            "aegaeon_slo_requests",
            "Ended requests by whether 99 % of their tokens were on time.",
            labels=["model_name", "result"],
        )
        objective = GaugeMetricFamily(
            "aegaeon_slo_seconds",
            "The objectives of a model, for requests that bring none of their own.",
            labels=["model_name", "objective"],
        )
        for name, meter in list(self._meters.items()):
            counts = meter.counts
            tokens.add_metric([name, "on_time"], counts.tokens_on_time)
            tokens.add_metric([name, "late"], counts.tokens - counts.tokens_on_time)
            requests.add_metric([name, "met"], counts.requests_met)
            requests.add_metric([name, "missed"], counts.requests_missed)
            requests.add_metric([name, "withdrawn"], counts.requests_withdrawn)
            objective.add_metric([name, "ttft"], meter.slo.ttft_ms / 1e3)
            objective.add_metric([name, "tpot"], meter.slo.tpot_ms / 1e3)
        yield tokens
        yield requests
        yield objective
