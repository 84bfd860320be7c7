"""A server's pool file as a scenario for the planner: its checkpoints' sizes, its objectives.

What the checkpoints do not say is assumed: steps and prefills scaled from the published profile of
the nearest size on that GPU, 2 bytes per KV element, without a trace Poisson arrivals of chat.
"""

from __future__ import annotations

import json
from pathlib import Path

from aegaeon.checkpoint import weight_bytes
from aegaeon.core.config import ModelConfig, PoolConfig
from aegaeon.core.errors import ConfigError, ModelLoadError
from aegaeon.core.slo import TokenDeadlines
from aegaeon.sim.hardware import GPUS, Gpu, GpuGroup, Model
from aegaeon.sim.workload import Load, Scenario

_KV_BYTES = 2


def scenario_of(pool: PoolConfig, name: str, *, gpu: str, rate: float) -> Scenario:
    """One instance per `tensor_parallel_size` that the pool's models ask for.

    rate: requests per second of each model, where no trace says otherwise. Raises ConfigError for
    an unknown GPU, ModelLoadError for a checkpoint whose size cannot be read.
    """
    if gpu not in GPUS:
        raise ConfigError(f"unknown GPU {gpu!r}; expected one of: {', '.join(GPUS)}")
    loads = tuple(Load(_model(model), rate) for model in pool.models)
    known, budget = GPUS[gpu], pool.device_memory
    share = budget.share
    if share is None:
        known = Gpu(gpu, budget.resolve(0), known.link_bytes_per_s, known.hbm_bytes_per_s)
        share = 1.0
    groups = tuple(
        GpuGroup(known, 1, tp=tp, memory_share=share)
        for tp in sorted({load.model.tp for load in loads})
    )
    return Scenario(name, loads, groups)


def _model(config: ModelConfig) -> Model:
    path = Path(config.model)
    return Model(
        name=config.name,
        weights_bytes=weight_bytes(config.name, path),
        kv_bytes_per_token=_kv_bytes_per_token(config.name, path / "config.json"),
        kv_memory_bytes=config.kv_memory,
        tp=int(config.vllm.get("tensor_parallel_size", 1)),
        deadlines=TokenDeadlines(config.slo.ttft_ms / 1e3, config.slo.tpot_ms / 1e3),
        priority=config.priority,
    )


def _kv_bytes_per_token(name: str, path: Path) -> int:
    """Of a model with keys and values in each layer; 2 x layers x KV heads x head size."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings = settings.get("text_config", settings)
        heads = settings["num_attention_heads"]
        head_size = settings.get("head_dim") or settings["hidden_size"] // heads
        kv_heads = settings.get("num_key_value_heads") or heads
        return int(2 * settings["num_hidden_layers"] * kv_heads * head_size * _KV_BYTES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(name, f"{path} does not tell its KV size: {error!r}") from error
