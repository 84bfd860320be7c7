"""Memory for many models on few GPUs: physical memory that moves between stable addresses.

Knows bytes, addresses, streams and layouts; never a request, a model or an engine. Importing it
needs no GPU, no driver and no torch.
"""

from aegaeon_kernels import kv
from aegaeon_kernels.alias_set import AliasSet
from aegaeon_kernels.arena import (
    Arena,
    ArenaStats,
    Device,
    Hooks,
    MapStep,
    Region,
    Transaction,
    UnmapStep,
)
from aegaeon_kernels.errors import (
    DriverError,
    Error,
    Evictable,
    IntegrityError,
    LifecycleError,
    OutOfMemory,
    RegionRange,
    Shortage,
    TransferCancelled,
)
from aegaeon_kernels.fill import compare_with_safetensors, fill_from_safetensors
from aegaeon_kernels.host_image import HostImage
from aegaeon_kernels.host_memory import HostMemory, HostPool, HostPoolStats
from aegaeon_kernels.image_layout import ImageLayout
from aegaeon_kernels.kv_layout import KVLayout
from aegaeon_kernels.kv_mover import BlockMover, PathRule
from aegaeon_kernels.prefetch import Prefetcher, PrefetchStats, Ticket, TicketState
from aegaeon_kernels.safetensors_file import Checkpoint
from aegaeon_kernels.shared_region import SharedHandles, SharedRegion
from aegaeon_kernels.torch_pool import TorchPool, TorchPoolStats

__all__ = [
    "AliasSet",
    "Arena",
    "ArenaStats",
    "BlockMover",
    "Checkpoint",
    "Device",
    "DriverError",
    "Error",
    "Evictable",
    "Hooks",
    "HostImage",
    "HostMemory",
    "HostPool",
    "HostPoolStats",
    "ImageLayout",
    "IntegrityError",
    "KVLayout",
    "LifecycleError",
    "MapStep",
    "OutOfMemory",
    "PathRule",
    "PrefetchStats",
    "Prefetcher",
    "Region",
    "RegionRange",
    "SharedHandles",
    "SharedRegion",
    "Shortage",
    "Ticket",
    "TicketState",
    "TorchPool",
    "TorchPoolStats",
    "Transaction",
    "TransferCancelled",
    "UnmapStep",
    "compare_with_safetensors",
    "fill_from_safetensors",
    "kv",
]
