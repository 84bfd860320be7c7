"""Which KV blocks of an engine core hold something that is still needed, which a step writes, and
how they get other numbers.

Nearly all of it concerns the scheduler's side, in the engine's process, whatever workers there are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    RSWAManager,
    SlidingWindowManager,
)

from aegaeon.switching.residency import DroppedKV
from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream
from aegaeon_kernels.kv_compact import Moves

# Where token t of a request lies in block t // block_size of its table, and is written once: when
# it is computed. Of other kinds (states of mamba layers, rings) every block counts as written.
_APPEND_ONLY = frozenset(
    {ChunkedLocalAttentionManager, FullAttentionManager, RSWAManager, SlidingWindowManager}
)


class EngineBlocks:
    """The `BlockBook` of an engine core; every method is right between two steps only.

    Blocks are allocated by `schedule()`, so what a step will use is known once it has been called.

    renumber_in_worker: called with the new number of every block, by its old one.
    """

    def __init__(
        self, scheduler: Any, renumber_in_worker: Callable[[npt.NDArray[np.int32]], None]
    ) -> None:
        self._renumber_in_worker = renumber_in_worker
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

    def immovable(self) -> list[int]:
        return [self._pool.null_block.block_id]

    def renumber(self, moves: Moves) -> None:
        """Exchange the numbers of block objects: tables of requests, reference counts, hashes and
        places in the free queue stay with the objects.
        """
        pool = self._pool
        assert not pool._reuse_watchers, "a connector reads blocks by their number"
        new_ids = np.arange(pool.num_gpu_blocks, dtype=np.int32)
        for old, new in zip(moves.src_ids.tolist(), moves.dst_ids.tolist(), strict=True):
            block, spare = pool.blocks[old], pool.blocks[new]
            assert spare.ref_cnt == 0, "somebody uses it"
            assert spare.block_hash is None, "the prefix cache remembers it"
            block.block_id, spare.block_id = new, old
            pool.blocks[new], pool.blocks[old] = block, spare
            new_ids[old], new_ids[new] = new, old
        hashes = pool.cached_block_hashes_by_block
        moved = {
            number: hashes.pop(number) for number in moves.src_ids.tolist() if number in hashes
        }
        hashes.update({int(new_ids[number]): values for number, values in moved.items()})
        for key, cached in pool.cached_block_hash_to_block._cache.items():
            if isinstance(cached, dict):  # in order: the first one is what a request is given
                pool.cached_block_hash_to_block._cache[key] = {
                    block.block_id: block for block in cached.values()
                }
        for manager in self._managers:
            manager.new_block_ids[:] = [int(new_ids[number]) for number in manager.new_block_ids]
        self._renumber_in_worker(new_ids)

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


def renumber_tables(model_runner: Any, new_ids: npt.NDArray[np.int32]) -> None:
    """The worker's side: what vLLM's model runner remembers of block tables between steps.

    new_ids: the new number of every block, by its old one. Rows of no request hold old numbers,
    which are exchanged too and mean as little as before.
    """
    states = getattr(model_runner, "requests", None)
    if states is None:  # the second model runner keeps tables on the device, and nothing else
        for table in model_runner.block_tables.block_tables:
            lookup = torch.from_numpy(new_ids).to(table.gpu.device)
            table.gpu.copy_(lookup[table.gpu.long()])
        return
    for state in states.values():
        for numbers in state.block_ids:
            numbers[:] = new_ids[numbers].tolist()
    for table in model_runner.input_batch.block_table.block_tables:
        table.block_table.np[:] = new_ids[table.block_table.np]


SEAM = Seam(
    name="kv_blocks",
    tier=Tier.PRIVATE,
    why="eviction copies only blocks whose bytes matter, and of those only what has been written "
    "since the last time; a cache that gives memory back moves its blocks to the front",
    how="reads the block tables and the prefix cache of the scheduler's KV cache manager, and "
    "which tokens a step computes; a full host store preempts by reset_prefix_cache; moved blocks "
    "exchange the numbers of their block objects, and the worker's tables are rewritten",
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
        Upstream("vllm.v1.core.kv_cache_utils", "KVCacheBlock.block_id"),
        Upstream("vllm.v1.core.block_pool", "BlockPool.cached_block_hashes_by_block"),
        Upstream("vllm.v1.core.block_pool", "BlockPool._reuse_watchers"),
        Upstream(
            "vllm.v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager.new_block_ids"
        ),
        Upstream("vllm.v1.worker.gpu_input_batch", "CachedRequestState.block_ids"),
        Upstream("vllm.v1.worker.gpu_input_batch", "InputBatch.block_table"),
        Upstream("vllm.v1.worker.block_table", "MultiGroupBlockTable.block_tables"),
        Upstream("vllm.v1.worker.block_table", "BlockTable.block_table"),
        Upstream("vllm.v1.worker.gpu.block_table", "BlockTables.block_tables"),
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
