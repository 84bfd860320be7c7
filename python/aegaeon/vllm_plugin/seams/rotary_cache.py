"""Rotary embeddings are never shared between models."""

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


def forget_shared_rotary_modules() -> None:
    """Call before each model load, so that the model gets rotary modules of its own."""
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()


SEAM = Seam(
    name="rotary_cache",
    tier=Tier.PRIVATE,
    why="vLLM caches rotary modules per process by their parameters; a second model would use the "
    "first one's cos/sin table, which lies in memory that is evicted with the first one",
    how="the cache is cleared before every model load",
    upstream_link="https://github.com/vllm-project/vllm/issues/15254",
    remove_when="the cache is keyed by engine, or can be switched off",
    relies_on=(Upstream("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT"),),
)
