"""Prometheus metrics of one instance: switches, bytes moved, who holds the device memory."""

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from aegaeon.switching.residency import ModelState
from aegaeon.switching.switcher import Switcher, SwitchRecord

# From a bookkeeping change to a large model over a slow link.
_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class SwitchMetrics:
    """Observes a switcher; `exposition()` is the text that the front appends to `/metrics`.

    others: what else is exposed with it.
    """

    def __init__(self, switcher: Switcher, *others: Collector) -> None:
        self._registry = CollectorRegistry()
        for other in others:
            self._registry.register(other)
        self._seconds = Histogram(
            "aegaeon_switch_seconds",
            "Time of a switch, by path (hot: resident, warm: from the host image) and phase.",
            ("path", "phase"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_SwitcherCollector(switcher))
        switcher.on_switch = self.observe

    def observe(self, record: SwitchRecord) -> None:
        self._seconds.labels(record.path, "total").observe(record.seconds)
        if record.path != "hot":
            for phase in ("save", "unmap", "map", "load"):
                seconds = getattr(record, f"{phase}_s")
                self._seconds.labels(record.path, phase).observe(seconds)

    def seconds(self) -> dict[str, list[tuple[float | None, int]]]:
        """Of each path: (upper bound in seconds, how many switches took no longer and more than the
        bound before); the last bound is None, and takes the rest.
        """
        counts: dict[str, dict[float, int]] = {}
        for family in self._seconds.collect():
            for sample in family.samples:
                if sample.name.endswith("_bucket") and sample.labels["phase"] == "total":
                    of_path = counts.setdefault(sample.labels["path"], {})
                    of_path[float(sample.labels["le"])] = int(sample.value)
        return {
            path: [
                (bound if bound < math.inf else None, count - before)
                for (bound, count), before in zip(
                    sorted(cumulative.items()), [0, *sorted(cumulative.values())], strict=False
                )
            ]
            for path, cumulative in counts.items()
        }

    def exposition(self) -> str:
        return generate_latest(self._registry).decode()


class _SwitcherCollector(Collector):
    """Reads the switcher when scraped, from the scraping thread."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        totals = self._switcher.totals
        switches = CounterMetricFamily(
            "aegaeon_switches", "Changes of the current model.", labels=["path"]
        )
        switches.add_metric(["hot"], totals.hot)
        switches.add_metric(["warm"], totals.warm)
        yield switches
        yield CounterMetricFamily(
            "aegaeon_switch_failures",
            "Switches that failed and were undone.",
            value=totals.failed,
        )
        moved = CounterMetricFamily(
            "aegaeon_switch_bytes", "Bytes copied by switches.", labels=["direction"]
        )
        moved.add_metric(["in"], totals.bytes_in)
        moved.add_metric(["out"], totals.bytes_out)
        yield moved
        yield CounterMetricFamily(
            "aegaeon_kv_swapped_bytes",
            "KV cache bytes copied to the host by switches.",
            value=totals.bytes_out,
        )
        yield CounterMetricFamily(
            "aegaeon_kv_dropped_blocks",
            "KV blocks given up because the host KV store was full.",
            value=totals.dropped_blocks,
        )
        yield CounterMetricFamily(
            "aegaeon_kv_recomputed_requests",
            "Requests whose KV was given up and is computed again.",
            value=totals.recomputed_requests,
        )
        yield CounterMetricFamily(
            "aegaeon_kv_compacted_blocks",
            "KV blocks moved on the device so that memory behind them could be given away.",
            value=totals.compacted_blocks,
        )
        store = self._switcher.kv_store.stats()
        kept = GaugeMetricFamily(
            "aegaeon_host_kv_bytes",
            "Host KV store: all of it, what its slabs take, what blocks take.",
            labels=["part"],
        )
        kept.add_metric(["capacity"], store.capacity_bytes)
        kept.add_metric(["slabs"], store.slab_bytes)
        kept.add_metric(["used"], store.used_bytes)
        yield kept
        stats = self._switcher.arena.stats()
        held = GaugeMetricFamily(
            "aegaeon_arena_bytes", "Device memory by owner and tag.", labels=["owner", "tag"]
        )
        for (owner, tag), num_bytes in stats.owners.items():
            held.add_metric([owner, tag], num_bytes)
        held.add_metric(["", "free"], stats.free_bytes)
        yield held
        yield GaugeMetricFamily(
            "aegaeon_arena_capacity_bytes",
            "Device memory that the pool may use.",
            value=stats.capacity_bytes,
        )
        state = GaugeMetricFamily(
            "aegaeon_model_state", "1 for the state a model is in.", labels=["model_name", "state"]
        )
        for name, memory in self._switcher.models.items():
            for value in ModelState:
                state.add_metric([name, value.value], float(memory.state is value))
        yield state
