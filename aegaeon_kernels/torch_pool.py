"""TorchPool: what torch allocates on the GPU comes from regions of an arena.

So a model that torch builds lies in memory that can be taken away and given back at the same
addresses. This module knows torch's memory pools; torch itself calls the native module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from aegaeon_kernels import _C
from aegaeon_kernels.arena import Region

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TorchPoolStats:
    allocated_bytes: int  # in pieces that torch holds, those that it only caches included
    num_pieces: int
    largest_free_bytes: int  # of address space, with or without memory behind it
    num_failed: int  # allocations for which there was no memory; torch may have tried them again
    last_failure: str  # why, the last time; or why memory that torch freed stays mapped


class TorchPool:
    """A torch memory pool that draws on one or more regions of one CUDA device.

    regions: where the memory comes from. Physical memory is mapped when torch asks for it, in whole
             handles as long as there are any, and unmapped when torch gives it back
             (`torch.cuda.empty_cache()`, or the end of the MemPool): best fit, 512-byte alignment.
             A region serves one pool only.

    Inside `with pool.use():` allocations of the current thread on that device come from here. That
    is per thread because torch's own routing is: threads started inside (autograd's, for example)
    allocate elsewhere. A graph capture into `pool.id` has to be inside too.

    When there is no memory, torch raises its OutOfMemoryError, after it has freed what it caches;
    `stats().last_failure` says who holds what. The next allocation starts afresh.

    Evicting: `region.unmap()` takes the memory from under the tensors, which may not be touched
    until the same ranges (`region.mapped_ranges()`, asked before) are mapped again. Tensors may
    outlive this object: the memory they hold keeps the region and its address.

    Raises ValueError (no region, regions of several devices or not of a GPU), LifecycleError (a
    region serves a pool already).
    """

    def __init__(self, regions: Region | Sequence[Region]) -> None:
        regions = [regions] if isinstance(regions, Region) else list(regions)
        for region in regions:
            if region.arena.device.kind != "cuda":
                raise ValueError(
                    f"a TorchPool is for regions of a CUDA device, not of "
                    f"{region.arena.device.name!r}: there use region.tensor()"
                )
        self.regions = tuple(regions)
        self._pool = _C.TorchPool([region._region for region in regions])

    @functools.cached_property
    def mempool(self) -> torch.cuda.MemPool:
        """The torch.cuda.MemPool behind it. Made on first use, which starts CUDA in torch."""
        import torch

        return torch.cuda.MemPool(_allocator())

    @property
    def id(self) -> tuple[int, int]:
        """For `torch.cuda.graph(graph, pool=pool.id)`, inside `with pool.use():`."""
        return self.mempool.id

    @contextmanager
    def use(self) -> Iterator[Self]:
        """Allocations of this thread on the pool's device come from the pool. May be nested."""
        import torch

        device = torch.device("cuda", self._device_index)
        self._pool.activate()
        try:
            with torch.cuda.use_mem_pool(self.mempool, device):
                yield self
        finally:
            self._pool.deactivate()

    @property
    def _device_index(self) -> int:
        return self.regions[0].arena.device._driver.device_index

    def trim(self) -> int:
        """Unmap the handles in which torch holds nothing; how many bytes. For what is left mapped.

        Freeing does the same, except while a graph is being captured or when the driver refuses.
        Raises DriverError, LifecycleError, like Region.unmap().
        """
        return self._pool.trim()

    def stats(self) -> TorchPoolStats:
        native = self._pool.stats()
        return TorchPoolStats(
            **{name: getattr(native, name) for name in TorchPoolStats.__annotations__}
        )

    def __repr__(self) -> str:
        stats = self.stats()
        return f"TorchPool({list(self.regions)!r}, allocated_bytes={stats.allocated_bytes})"


@functools.cache
def _allocator() -> Any:
    # One for all pools, and for the life of the process: torch keeps pointers to it.
    import torch

    allocator: Any = torch.cuda.memory.CUDAPluggableAllocator(
        _C.__file__, "aegaeon_torch_malloc", "aegaeon_torch_free"
    )
    return allocator.allocator()
