"""Which KV blocks of an engine core hold something that is still needed, and which a step writes.

All of it is read on the scheduler's side, in the engine's process, whatever workers there are.
"""

from collections.abc import Iterator
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    RSWAManager,
    SlidingWindowManager,
)

from aegaeon.switching.residency import DroppedKV
from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream

# Where token t of a request lies in block t // block_size of its table, and is written once: when
# it is computed. Of other kinds (states of mamba layers, rings) every block counts as written.
_APPEND_ONLY = frozenset(
    {ChunkedLocalAttentionManager, FullAttentionManager, RSWAManager, SlidingWindowManager}
)


class EngineBlocks:
    """The `BlockBook` of an engine core; every method is right between two steps only.

    Blocks are allocated by `schedule()`, so what a step will use is known once it has been called.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers

    def live(self) -> list[int]:
        """Blocks that a request uses or the prefix cache remembers. Cost: O(their number).

        Without the null block, which stands in for pages outside a sliding window: nothing is kept
        in it, and kv_zeroing keeps its bytes finite.
        """
        blocks = {block.block_id: block for block in self._reachable_blocks()}
        num_used = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
        if sum(block.ref_cnt > 0 for block in blocks.values()) != num_used:
            # Something beside requests holds a reference: ask every block.
            blocks = {
                block.block_id: block
                for block in self._pool.blocks
                if block.ref_cnt > 0 or block.block_hash is not None
            }
            blocks.pop(self._pool.null_block.block_id, None)
        return sorted(blocks)

    def _reachable_blocks(self) -> Iterator[Any]:
        for manager in self._managers:
            for blocks in manager.req_to_blocks.values():
                yield from (block for block in blocks if not block.is_null)
        for cached in self._pool.cached_block_hash_to_block._cache.values():
            if isinstance(cached, dict):
                yield from cached.values()
            else:
                yield cached

    def drop(self) -> DroppedKV:
        """Preempt every running request, as vLLM does when it runs out of blocks, and forget the
        prefix cache: their tokens are computed again when they are next scheduled.
        """
        num_blocks = len(self.live())
        num_requests = len(self._scheduler.running)
        dropped = self._scheduler.reset_prefix_cache(reset_running_requests=True)
        assert dropped, "without connectors every block is a running request's or cached"
        return DroppedKV(num_blocks, num_requests)

    def written_by(self, scheduler_output: Any) -> set[int]:
        """Blocks that the step of `scheduler_output` writes to: zeroed, copied or computed."""
        written = set(scheduler_output.new_block_ids_to_zero or ())
        written |= {copy.dst_block_id for copy in scheduler_output.kv_cache_block_copies or ()}
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {
            new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs
        }
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            start = starts[request_id]
            for manager in self._managers:
                blocks = manager.req_to_blocks.get(request_id, ())
                if type(manager) in _APPEND_ONLY:
                    size = manager.block_size
                    blocks = blocks[start // size : -(-(start + num_tokens) // size)]
                written |= {block.block_id for block in blocks if not block.is_null}
        return written


SEAM = Seam(
    name="kv_blocks",
    tier=Tier.PRIVATE,
    why="eviction copies only blocks whose bytes matter, and of those only what has been written "
    "since the last time",
    how="reads the block tables and the prefix cache of the scheduler's KV cache manager, and "
    "which tokens a step computes; a full host store preempts by reset_prefix_cache",
    upstream_link="https://github.com/vllm-project/vllm/pull/51718",
    remove_when="the KV cache manager lists its live blocks and those that a step writes",
    relies_on=(
        Upstream("vllm.v1.core.kv_cache_manager", "KVCacheManager.block_pool"),
        Upstream("vllm.v1.core.kv_cache_manager", "KVCacheManager.coordinator"),
        Upstream("vllm.v1.core.kv_cache_coordinator", "KVCacheCoordinator.single_type_managers"),
        Upstream(
            "vllm.v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager.req_to_blocks"
        ),
        Upstream(
            "vllm.v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager.block_size"
        ),
        Upstream("vllm.v1.core.single_type_kv_cache_manager", "ChunkedLocalAttentionManager"),
        Upstream("vllm.v1.core.single_type_kv_cache_manager", "RSWAManager"),
        Upstream("vllm.v1.core.single_type_kv_cache_manager", "SlidingWindowManager"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.blocks"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.null_block"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.num_gpu_blocks"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.cached_block_hash_to_block"),
        Upstream("vllm.v1.core.block_pool", "BlockHashToBlockMap._cache"),
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlock.ref_cnt"),
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlock.block_hash"),
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlock.is_null"),
        Upstream("vllm.v1.core.sched.output", "SchedulerOutput.kv_cache_block_copies"),
        Upstream("vllm.v1.core.sched.output", "SchedulerOutput.num_scheduled_tokens"),
        Upstream("vllm.v1.core.sched.output", "CachedRequestData.num_computed_tokens"),
        Upstream("vllm.v1.core.sched.output", "NewRequestData.num_computed_tokens"),
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlockCopy.dst_block_id"),
        Upstream("vllm.v1.core.sched.scheduler", "Scheduler.running"),
        Upstream(
            "vllm.v1.core.sched.scheduler",
            "Scheduler.reset_prefix_cache",
            ("reset_running_requests",),
        ),
    ),
)
