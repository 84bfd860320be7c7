"""The device memory of a process that hosts vLLM engines: arena, prefetcher, switcher."""

import torch

import aegaeon_kernels as ak
from aegaeon.core import envs
from aegaeon.core.clock import Clock
from aegaeon.switching.kv_store import HostKVStore
from aegaeon.switching.switcher import Switcher
from aegaeon.vllm_plugin.seams.process_state import ProcessStates

# Up to here the host device uses handles of its granularity: to move one costs next to nothing. Of
# large and small ones, which models of unequal size need in turn, some are made anew each time
# (bench_switch: 6 ms a switch against 12 with 8 MiB handles and 56 with 32 MiB). Above, the number
# of memory mappings of a process would become the limit.
SMALL_HANDLES_UP_TO_BYTES = 16 << 30


def make_switcher(
    device: ak.Device,
    *,
    device_memory_bytes: int,
    host_memory_bytes: int | None,
    host_kv_memory_bytes: int,
    clock: Clock,
) -> Switcher:
    """A switcher over `device_memory_bytes` of `device`, rounded down to whole pages of it, with a
    host KV store of `host_kv_memory_bytes`.

    It exchanges vLLM's process-wide state with the current model, and lets the GPU finish what it
    is doing before memory changes hands.
    """
    granularity = device.granularity_bytes
    small = device.kind == "host" and device_memory_bytes <= SMALL_HANDLES_UP_TO_BYTES
    states = ProcessStates()
    return Switcher(
        arena=ak.Arena(
            device,
            capacity_bytes=device_memory_bytes // granularity * granularity,
            handle_bytes=granularity if small else None,
            poison=envs.poison_memory(),
        ),
        prefetcher=ak.Prefetcher(device),
        kv_store=HostKVStore(
            ak.HostImage.allocate(host_kv_memory_bytes, device=device, name="KV store")
        ),
        clock=clock,
        host_memory_bytes=host_memory_bytes,
        on_activate=states.exchange,
        on_remove=states.forget,
        quiesce=torch.cuda.synchronize if device.kind == "cuda" else lambda: None,
    )
