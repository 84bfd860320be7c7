"""Device, Arena, Region: physical memory that moves between stable address ranges.

This module knows bytes, addresses and owners' names. It does not know what is stored in them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aegaeon_kernels import _C
from aegaeon_kernels._dlpack import as_torch, wants_versioned

if TYPE_CHECKING:
    import torch

CUDA_LIBRARY = "libcuda.so.1"


class Device:
    """A device with memory of its own: "host" (emulated in this process) or "cuda:N".

    name:         "host", "cuda" (the first GPU) or "cuda:N".
    memory_bytes: capacity of the host device; by default half of this machine's memory.
    library:      path of the CUDA driver library. Only for "cuda".

    Raises ValueError for an unknown name and DriverError, with what to do, when the driver or the
    GPU is missing.
    """

    def __init__(
        self, name: str, *, memory_bytes: int | None = None, library: str = CUDA_LIBRARY
    ) -> None:
        self._driver = _open_driver(name, memory_bytes, library)

    @staticmethod
    def available(*, library: str = CUDA_LIBRARY) -> list[str]:
        """Names of the devices that can be opened here; "host" always comes first."""
        count = _C.count_cuda_devices(library=library)
        return ["host", *(f"cuda:{index}" for index in range(count))]

    @property
    def name(self) -> str:
        return self._driver.name

    @property
    def kind(self) -> str:
        """ "host" or "cuda"."""
        return self._driver.kind

    @property
    def granularity_bytes(self) -> int:
        """Sizes and offsets of mappings are multiples of this."""
        return self._driver.granularity_bytes

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the device, whoever uses them. Raises DriverError."""
        return self._driver.memory_info()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def _open_driver(name: str, memory_bytes: int | None, library: str) -> _C.Driver:
    kind, _, index = name.partition(":")
    if kind == "host" and not index:
        if memory_bytes is None:
            memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        if memory_bytes <= 0:
            raise ValueError(f"memory_bytes={memory_bytes} has to be positive")
        return _C.make_host_driver(capacity_bytes=memory_bytes, move_page_tables=True)
    if kind == "cuda" and (index or "0").isdecimal():
        if memory_bytes is not None:
            raise ValueError("memory_bytes is for the host device; a GPU has what it has")
        return _C.make_cuda_driver(index=int(index or "0"), library=library)
    raise ValueError(f'unknown device {name!r}: expected "host", "cuda" or "cuda:N"')


@dataclass(frozen=True)
class ArenaStats:
    """A snapshot. sum(owners) + free_bytes + quarantined_bytes == capacity_bytes, always."""

    owners: Mapping[tuple[str, str], int]  # (owner, tag): bytes mapped in their regions
    capacity_bytes: int
    free_bytes: int
    quarantined_bytes: int  # the driver refused to unmap them; tried again at later calls
    handle_bytes: int
    num_regions: int
    created_bytes: int  # of the handles that exist; the rest of the capacity was never created
    num_handles: int  # of handle_bytes
    num_tail_handles: int  # of the granularity
    num_free_handles: int
    num_free_tail_handles: int
    total_created: int  # driver calls since the arena began
    total_released: int
    total_converted: int  # of the releases: free handles of one size given up for the other

    @property
    def owned_bytes(self) -> int:
        return sum(self.owners.values())


class Arena:
    """The physical memory of a device as handles that are created once and move between regions.

    capacity_bytes: most it will ever hold; a multiple of the device's granularity. Nothing is
                    created before it is mapped.
    handle_bytes:   size of the large handles, the unit in which memory moves; heads and tails of a
                    mapping use handles of the granularity. None: a power of two near
                    capacity / 256, between the granularity and 64 MiB.

    Safe to use from several threads. A context manager: leaving it closes it.
    """

    def __init__(
        self, device: Device, *, capacity_bytes: int, handle_bytes: int | None = None
    ) -> None:
        for name, value in (("capacity_bytes", capacity_bytes), ("handle_bytes", handle_bytes)):
            _require_not_negative(name, value)
        self.device = device
        self._arena = _C.Arena(
            device._driver, capacity_bytes=capacity_bytes, handle_bytes=handle_bytes
        )

    @property
    def capacity_bytes(self) -> int:
        return self._arena.capacity_bytes

    @property
    def handle_bytes(self) -> int:
        return self._arena.handle_bytes

    def reserve(self, size_bytes: int, *, owner: str, tag: str = "") -> Region:
        """Reserve a virtual range. Its address never changes; it holds no physical memory yet.

        size_bytes: a multiple of the device's granularity. owner, tag: for accounting and messages.
        Raises ValueError, DriverError, LifecycleError (closed).
        """
        _require_not_negative("size_bytes", size_bytes)
        return Region(self, self._arena.reserve(size_bytes=size_bytes, owner=owner, tag=tag))

    def set_limit(self, owner: str, min_bytes: int = 0, max_bytes: int | None = None) -> None:
        """Keep min_bytes available to the owner (all tags together), allow it max_bytes at most.

        A maximum below what it holds now takes nothing away; it only stops further mappings.
        Raises ValueError when min > max, or when all minima together exceed the capacity.
        """
        for name, value in (("min_bytes", min_bytes), ("max_bytes", max_bytes)):
            _require_not_negative(name, value)
        self._arena.set_limit(owner=owner, min_bytes=min_bytes, max_bytes=max_bytes)

    def stats(self) -> ArenaStats:
        native = self._arena.stats()
        return ArenaStats(**{name: getattr(native, name) for name in ArenaStats.__annotations__})

    def close(self) -> None:
        """Close all regions, release all memory. Does nothing when closed already.

        Raises LifecycleError, before anything is done, while a transfer on a region is in flight,
        and DriverError: then what is closed stays closed, and close() may be called again.
        """
        self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Arena({self.device.name!r}, capacity_bytes={self.capacity_bytes})"


class Region:
    """A stable virtual range of an arena. Physical memory comes with map() and goes with unmap().

    Made by Arena.reserve(). Sizes and offsets are bytes, multiples of the device's granularity.
    A context manager: leaving it closes it.
    """

    def __init__(self, arena: Arena, native: _C.Region) -> None:
        self.arena = arena
        self._region = native

    @property
    def address(self) -> int:
        return self._region.address

    @property
    def size_bytes(self) -> int:
        return self._region.size_bytes

    @property
    def mapped_bytes(self) -> int:
        return self._region.mapped_bytes

    @property
    def generation(self) -> int:
        """Grows with every map and unmap: what was registered with a NIC or a library is stale."""
        return self._region.generation

    @property
    def owner(self) -> str:
        return self._region.owner

    @property
    def tag(self) -> str:
        return self._region.tag

    @property
    def closed(self) -> bool:
        return self._region.closed

    def mapped_ranges(self) -> list[tuple[int, int]]:
        """The mapped parts as (offset_bytes, size_bytes), neighbours joined, in order."""
        return self._region.mapped_ranges()

    def map(self, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        """Back a range with physical memory (None: up to the end): all of it, or none on any error.

        The contents are undefined: another owner's old bytes, unless the caller overwrites them.
        Large handles lie at multiples of the arena's handle_bytes, which are therefore always
        places where unmap may cut.
        Raises ValueError, OutOfMemory (who holds what, what is missing), DriverError,
        LifecycleError (closed, or part of the range is mapped already).
        """
        _require_not_negative("offset_bytes", offset_bytes)
        _require_not_negative("size_bytes", size_bytes)
        self._region.map(offset_bytes=offset_bytes, size_bytes=size_bytes)

    def unmap(self, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        """Take the memory of a range away (None: all that is mapped from the offset on).

        The memory goes back to the arena. The device must be done with it: nothing here waits for
        kernels in flight. Raises ValueError, DriverError (all is mapped as before), LifecycleError
        (closed; not mapped; a cut through a handle; a transfer on the region is in flight).
        """
        _require_not_negative("offset_bytes", offset_bytes)
        _require_not_negative("size_bytes", size_bytes)
        self._region.unmap(offset_bytes=offset_bytes, size_bytes=size_bytes)

    def close(self) -> None:
        """Unmap everything and give the address range up. Does nothing when closed already.

        While tensors over the region live, the range stays reserved: using them then is a fault,
        never somebody else's bytes. Raises LifecycleError (a transfer is in flight), DriverError
        (all is as before).
        """
        self._region.close()

    def tensor(
        self, shape: Sequence[int], dtype: torch.dtype, offset_bytes: int = 0
    ) -> torch.Tensor:
        """A torch tensor over the range, without a copy; C-contiguous, on the region's device.

        The tensor keeps the region alive and the address reserved, not the memory: after unmap it
        may not be touched until the range is mapped again.
        offset_bytes: a multiple of the item size.
        Raises ValueError (outside the region, misaligned), LifecycleError (not mapped, closed).
        """
        return as_torch(self._export, self.size_bytes, offset_bytes, shape, dtype)

    def _export(
        self, offset_bytes: int, shape: Sequence[int], code: int, bits: int, versioned: bool
    ) -> object:
        return self._region.dlpack(
            offset_bytes=offset_bytes,
            shape=list(shape),
            type_code=code,
            type_bits=bits,
            versioned=versioned,
        )

    def __dlpack__(self, **wanted: Any) -> object:
        """The whole region as bytes, for numpy, cupy and torch.

        Raises LifecycleError unless all of it is mapped.
        """
        return self._export(0, [self.size_bytes], 1, 8, wants_versioned(wanted))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.arena.device._driver.dlpack_device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Region({self.owner!r}, {self.tag!r}, address={self.address:#x}, "
            f"size_bytes={self.size_bytes}, mapped_bytes={self.mapped_bytes})"
        )


def _require_not_negative(name: str, value: int | None) -> None:
    if value is not None and value < 0:
        raise ValueError(f"{name}={value} is negative")
