"""KV blocks that nobody has written are zeroed before use: their bytes may be another model's.

vLLM relies on stale KV bytes being finite numbers: rows that attention masks out are still
multiplied, and a NaN there poisons the output. Pages that held another model break that. It goes
for new blocks, and for the null block, which stands in for pages outside a sliding window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream
from aegaeon_kernels.kv_layout import KVLayout, merged_ranges


def _always_zero() -> None:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda self: True)


def zero_new_blocks(
    scheduler_output: Any, cache: torch.Tensor, layouts: Sequence[KVLayout]
) -> None:
    """Zero the blocks that `scheduler_output` allocates, in every layer whatever its kind.

    cache: the whole KV allocation, 1-D of one-byte elements. vLLM's own CPU runner zeroes
    full-attention layers only, so its list is taken over here.
    """
    block_ids = scheduler_output.new_block_ids_to_zero
    if not block_ids:
        return
    _zero(cache, layouts, block_ids)
    scheduler_output.new_block_ids_to_zero = None


def zero_null_block(cache: torch.Tensor, layouts: Sequence[KVLayout]) -> None:
    """Once whenever the cache has got other memory: what is in this block is kept by nobody."""
    _zero(cache, layouts, [NULL_BLOCK_ID])


def _zero(cache: torch.Tensor, layouts: Sequence[KVLayout], block_ids: Sequence[int]) -> None:
    for offset_bytes, size_bytes in merged_ranges(layouts, block_ids):
        cache[offset_bytes : offset_bytes + size_bytes].zero_()


SEAM = Seam(
    name="kv_zeroing",
    tier=Tier.PRIVATE,
    why="KV pages come from other models; vLLM takes stale KV bytes to be finite, and a NaN among "
    "them spoils every row of the batch",
    how="the property needs_kv_cache_zeroing answers True, so that the scheduler reports new "
    "blocks; the worker zeroes them before the step, and the null block when memory has changed",
    upstream_link="https://github.com/vllm-project/vllm/issues/35219",
    remove_when="vLLM offers a setting that forces zeroing of new blocks",
    relies_on=(
        Upstream("vllm.v1.kv_cache_interface", "KVCacheConfig.needs_kv_cache_zeroing"),
        Upstream("vllm.v1.core.sched.output", "SchedulerOutput.new_block_ids_to_zero"),
        Upstream("vllm.v1.core.sched.scheduler", "Scheduler._get_new_block_ids_to_zero"),
        Upstream("vllm.v1.attention.backends.utils", "NULL_BLOCK_ID"),
    ),
    apply=_always_zero,
)
