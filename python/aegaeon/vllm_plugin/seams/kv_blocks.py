"""Which KV blocks of an engine core hold something that is still needed."""

from typing import Any

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


def live_block_ids(engine_core: Any) -> list[int]:
    """Blocks that a request uses or the prefix cache remembers, and the null block.

    Only right between steps, when nothing is scheduled: blocks are allocated by `schedule()`.
    The null block stands in for pages outside a sliding window; kernels read it and mask it, so
    its bytes must stay finite.
    """
    pool = engine_core.scheduler.kv_cache_manager.block_pool
    live = [
        block.block_id
        for block in pool.blocks
        if not block.is_null and (block.ref_cnt > 0 or block.block_hash is not None)
    ]
    live.append(pool.null_block.block_id)
    return live


SEAM = Seam(
    name="kv_blocks",
    tier=Tier.PRIVATE,
    why="eviction copies only blocks whose bytes matter",
    how="reads the block pool of the scheduler's KV cache manager",
    upstream_link="https://github.com/vllm-project/vllm/pull/51718",
    remove_when="the KV cache manager lists its live blocks",
    relies_on=(
        Upstream("vllm.v1.core.kv_cache_manager", "KVCacheManager.block_pool"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.blocks"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.null_block"),
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlock.ref_cnt"),
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlock.block_hash"),
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlock.is_null"),
    ),
)
