"""The arena worker on the CPU: the host driver's memory, plain weight tensors."""

from vllm.v1.worker.cpu_worker import CPUWorker

from aegaeon.vllm_plugin.worker import ArenaWorker


class ArenaCPUWorker(ArenaWorker, CPUWorker):
    """vLLM's CPU worker, with weights and KV in the arena."""
