"""Several engine clients of one process share vLLM's Prometheus metrics, told apart by label."""

from typing import Any

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


def _share_registry() -> None:
    import prometheus_client
    from vllm.v1.metrics import loggers, perf
    from vllm.v1.spec_decode import metrics as spec_decode

    loggers.unregister_vllm_metrics = lambda: None
    shared = {
        "_gauge_cls": _once_per_name(prometheus_client.Gauge),
        "_counter_cls": _once_per_name(prometheus_client.Counter),
        "_histogram_cls": _once_per_name(prometheus_client.Histogram),
    }
    for owner in (loggers.PrometheusStatLogger, spec_decode.SpecDecodingProm, perf.PerfMetricsProm):
        for attribute, factory in shared.items():
            if hasattr(owner, attribute):
                setattr(owner, attribute, staticmethod(factory))


_collectors: dict[str, Any] = {}


def _once_per_name(factory: Any) -> Any:
    def make(name: str, *args: Any, **kwargs: Any) -> Any:
        if name not in _collectors:
            _collectors[name] = factory(name, *args, **kwargs)
        return _collectors[name]

    return make


SEAM = Seam(
    name="metrics_registry",
    tier=Tier.PRIVATE,
    why="each engine client first unregisters all vLLM metrics of the process, so a second model "
    "would erase the first one's",
    how="unregistering does nothing, and a metric is created once per name; labels model_name and "
    "engine keep the series apart",
    upstream_link="https://github.com/vllm-project/vllm/issues/299",
    remove_when="vLLM supports several engine clients in one process",
    relies_on=(
        Upstream("vllm.v1.metrics.loggers", "unregister_vllm_metrics"),
        Upstream("vllm.v1.metrics.loggers", "PrometheusStatLogger._gauge_cls"),
        Upstream("vllm.v1.metrics.loggers", "PrometheusStatLogger._counter_cls"),
        Upstream("vllm.v1.metrics.loggers", "PrometheusStatLogger._histogram_cls"),
        Upstream("vllm.v1.spec_decode.metrics", "SpecDecodingProm._counter_cls"),
        Upstream("vllm.v1.metrics.perf", "PerfMetricsProm._counter_cls"),
    ),
    apply=_share_registry,
)
