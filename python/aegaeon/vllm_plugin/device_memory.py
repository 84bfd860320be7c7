"""The device memory of a process that hosts vLLM engines: arena, prefetcher, switcher."""

import torch

import aegaeon_kernels as ak
from aegaeon.core.clock import Clock
from aegaeon.switching.switcher import Switcher
from aegaeon.vllm_plugin.seams.process_state import ProcessStates


def make_switcher(
    device: ak.Device,
    *,
    device_memory_bytes: int,
    host_memory_bytes: int | None,
    clock: Clock,
) -> Switcher:
    """A switcher over `device_memory_bytes` of `device`, rounded down to whole pages of it.

    It exchanges vLLM's process-wide state with the current model, and lets the GPU finish what it
    is doing before memory changes hands.
    """
    granularity = device.granularity_bytes
    states = ProcessStates()
    return Switcher(
        arena=ak.Arena(device, capacity_bytes=device_memory_bytes // granularity * granularity),
        prefetcher=ak.Prefetcher(device),
        clock=clock,
        host_memory_bytes=host_memory_bytes,
        on_activate=states.exchange,
        on_remove=states.forget,
        quiesce=torch.cuda.synchronize if device.kind == "cuda" else lambda: None,
    )
