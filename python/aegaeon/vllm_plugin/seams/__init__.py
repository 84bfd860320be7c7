"""All seams, checked together before any is applied."""

from aegaeon.vllm_plugin.seam import Seam, verify
from aegaeon.vllm_plugin.seams import (
    engine_core,
    expert_group,
    image_loader,
    kv_blocks,
    kv_memory,
    kv_zeroing,
    metrics_registry,
    openai_app,
    plain_weights,
    process_state,
    rotary_cache,
    weights,
)
from aegaeon.vllm_plugin.versions import check_version

SEAMS: tuple[Seam, ...] = (
    engine_core.SEAM,
    expert_group.SEAM,
    image_loader.SEAM,
    kv_blocks.SEAM,
    kv_memory.SEAM,
    kv_zeroing.SEAM,
    metrics_registry.SEAM,
    openai_app.SEAM,
    plain_weights.SEAM,
    process_state.SEAM,
    rotary_cache.SEAM,
    weights.SEAM,
)

_applied = False


def apply_all() -> tuple[str, ...]:
    """Check all seams against the installed vLLM, then apply them; the names of those applied.

    Raises SeamMismatch, with nothing applied, when one does not hold. The second call in a process
    does nothing and returns nothing.
    """
    global _applied
    if _applied:
        return ()
    check_version()
    verify(SEAMS)
    names = []
    for seam in SEAMS:
        if seam.apply is not None:
            seam.apply()
            names.append(seam.name)
    _applied = True
    return tuple(names)
