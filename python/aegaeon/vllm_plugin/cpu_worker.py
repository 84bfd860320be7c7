"""The arena worker on the CPU: the host driver's memory, plain weight tensors."""

from vllm.v1.worker.cpu_worker import CPUWorker

from aegaeon.vllm_plugin.seams import kv_memory
from aegaeon.vllm_plugin.worker import ArenaWorker


class ArenaCPUWorker(ArenaWorker, CPUWorker):
    """vLLM's CPU worker, with weights and KV in the arena."""

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """CPU attention declares one layout, per layer. Its kernels follow the strides, so the same
        inside of a block works with the block outermost.
        """
        return kv_memory.block_outermost_first(
            CPUWorker.get_supported_kv_cache_layouts(self), always=("BLHNC",)
        )
