"""All seams, checked together before any is applied."""

from aegaeon.vllm_plugin.seam import Seam, verify
from aegaeon.vllm_plugin.seams import (
    engine_core,
    expert_group,
    image_loader,
    kernel_overrides,
    kv_blocks,
    kv_memory,
    kv_zeroing,
    lora_base_rows,
    metrics_registry,
    openai_app,
    plain_weights,
    process_state,
    rotary_cache,
    seeded_chunks,
    weights,
)
from aegaeon.vllm_plugin.versions import check_version

SEAMS: tuple[Seam, ...] = (
    engine_core.SEAM,
    expert_group.SEAM,
    image_loader.SEAM,
    kernel_overrides.SEAM,
    kv_blocks.SEAM,
    kv_memory.SEAM,
    kv_zeroing.SEAM,
    lora_base_rows.SEAM,
    metrics_registry.SEAM,
    openai_app.SEAM,
    plain_weights.SEAM,
    process_state.SEAM,
    rotary_cache.SEAM,
    seeded_chunks.SEAM,
    weights.SEAM,
)

# Of these, those that a CPU's numbers may depend on: unpacked weights, and what mends wrong ones.
NUMBERS: tuple[Seam, ...] = (plain_weights.SEAM, seeded_chunks.SEAM, lora_base_rows.SEAM)

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


def apply_numbers() -> None:
    """Have plain vLLM compute, on a CPU, the very numbers that a hosted model computes.

    For comparisons, in a process where nothing else of ours is applied; call it once.
    """
    for seam in NUMBERS:
        assert seam.apply is not None
        seam.apply()
