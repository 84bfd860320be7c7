"""Device, Arena, Region, Transaction: physical memory that moves between stable address ranges.

This module knows bytes, addresses and owners' names. It does not know what is stored in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aegaeon_kernels import _C
from aegaeon_kernels._closing import ClosedOnExit
from aegaeon_kernels.alias_set import AliasSet
from aegaeon_kernels.contents import Contents, native_contents
from aegaeon_kernels.errors import Shortage
from aegaeon_kernels.shared_region import SharedHandles
from aegaeon_kernels.views import MemoryViews

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
    quarantined_bytes: int  # not unmapped, or their work is not known to be over; tried again later
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


@dataclass(frozen=True)
class MapStep:
    """Back a range of a region with memory; see Region.map()."""

    region: Region
    offset_bytes: int = 0
    size_bytes: int | None = None
    contents: Contents = "zero"
    read_only: bool = False

    def _native(self) -> _C.Step:
        _require_not_negative("offset_bytes", self.offset_bytes)
        _require_not_negative("size_bytes", self.size_bytes)
        return _C.Step.map(
            self.region._region,
            offset_bytes=self.offset_bytes,
            size_bytes=self.size_bytes,
            contents=native_contents(self.contents),
            read_only=self.read_only,
        )


@dataclass(frozen=True)
class UnmapStep:
    """Take the memory of a range of a region away; see Region.unmap()."""

    region: Region
    offset_bytes: int = 0
    size_bytes: int | None = None

    def _native(self) -> _C.Step:
        _require_not_negative("offset_bytes", self.offset_bytes)
        _require_not_negative("size_bytes", self.size_bytes)
        return _C.Step.unmap(
            self.region._region, offset_bytes=self.offset_bytes, size_bytes=self.size_bytes
        )


Step = MapStep | UnmapStep


class Transaction:
    """A plan under construction: the steps are checked and done when the block is left.

    Made by Arena.transaction(). Nothing happens when the block raises.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.steps: list[Step] = []

    def map(
        self,
        region: Region,
        offset_bytes: int = 0,
        size_bytes: int | None = None,
        *,
        contents: Contents = "zero",
        read_only: bool = False,
    ) -> None:
        self.steps.append(MapStep(region, offset_bytes, size_bytes, contents, read_only))

    def unmap(self, region: Region, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        self.steps.append(UnmapStep(region, offset_bytes, size_bytes))

    def check(self) -> Shortage | None:
        """Whether the budget admits the steps so far; see Arena.check()."""
        return self._arena.check(self.steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._arena.commit(self.steps)


class Arena(ClosedOnExit):
    """The physical memory of a device as handles that are created once and move between regions.

    capacity_bytes: most it will ever hold; a multiple of the device's granularity. Nothing is
                    created before it is mapped.
    handle_bytes:   size of the large handles, the unit in which memory moves; heads and tails of a
                    mapping use handles of the granularity. None: a power of two near
                    capacity / 256, between the granularity and 128 MiB.
    poison:         fill with 0xff (a NaN in bf16, fp16, fp32 and fp8-e4m3) whatever is not zeroed
                    when it is mapped, also where the caller says "preserve": then reading bytes
                    that nobody has written shows. For tests and debugging.
    exportable:     other processes may map what is mapped in its regions, see SharedRegion. On the
                    host device each handle is a descriptor then.

    Safe to use from several threads. A context manager: leaving it closes it, like Region.
    """

    def __init__(
        self,
        device: Device,
        *,
        capacity_bytes: int,
        handle_bytes: int | None = None,
        poison: bool = False,
        exportable: bool = False,
    ) -> None:
        for name, value in (("capacity_bytes", capacity_bytes), ("handle_bytes", handle_bytes)):
            _require_not_negative(name, value)
        self.device = device
        self._arena = _C.Arena(
            device._driver,
            capacity_bytes=capacity_bytes,
            handle_bytes=handle_bytes,
            poison=poison,
            exportable=exportable,
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
        return self._region_of(self._arena.reserve(size_bytes=size_bytes, owner=owner, tag=tag))

    def _region_of(self, native: _C.Region) -> Region:
        return Region(self, native)

    def alias_set(
        self, slot_bytes: int, *, owners: Sequence[str], tag: str = "", debug: bool = False
    ) -> AliasSet:
        """A region of slot_bytes for each owner, all over the same memory; see AliasSet.

        The slot is the first owner's and shows zeros. debug: only the owner's region is mapped, so
        that an access by anybody else faults. Raises ValueError (also: an owner twice),
        OutOfMemory, DriverError, LifecycleError (closed): nothing is left behind.
        """
        _require_not_negative("slot_bytes", slot_bytes)
        native = _C.AliasSet(
            self._arena, slot_bytes=slot_bytes, owners=list(owners), tag=tag, debug=debug
        )
        return AliasSet(self, native)

    def transaction(self) -> Transaction:
        """Several maps and unmaps that happen as one, when the block is left:

        with arena.transaction() as tx:
            tx.unmap(a)
            tx.map(b, contents="preserve")
        """
        return Transaction(self)

    def commit(self, steps: Iterable[Step]) -> None:
        """Do all steps, in order, or none of them.

        The plan is checked and admitted against the budget before the first driver call, counting
        what each step frees and takes; then unmapped regions' recorded work is waited for and
        their before_unmap hooks run. Contents are filled when everything is mapped. When a driver
        call fails, the steps done are undone in reverse: the same handles return to the same
        places, with their bytes and their access.

        Raises ValueError and LifecycleError (a step that does not fit the state the ones before it
        leave, a region in use), OutOfMemory (with `shortage`), DriverError: everything is as
        before, but for what its `quarantined` and `lost_contents` name. An error of an after_map
        hook is raised when everything is done, and undoes nothing.
        """
        self._arena.commit([step._native() for step in steps])

    def check(self, steps: Iterable[Step]) -> Shortage | None:
        """What commit() would lack for these steps; None when the budget admits them.

        Raises ValueError and LifecycleError as commit() does.
        """
        shortage: Shortage | None = self._arena.check([step._native() for step in steps])
        return shortage

    def set_limit(
        self,
        owner: str,
        min_bytes: int = 0,
        max_bytes: int | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """Keep min_bytes available to the owner (all tags together), allow it max_bytes at most.

        A maximum below what it holds now takes nothing away; it only stops further mappings.
        pinned: a Shortage never proposes to evict it. Replaces the owner's earlier limit.
        Raises ValueError when min > max, or when all minima together exceed the capacity.
        """
        for name, value in (("min_bytes", min_bytes), ("max_bytes", max_bytes)):
            _require_not_negative(name, value)
        self._arena.set_limit(owner=owner, min_bytes=min_bytes, max_bytes=max_bytes, pinned=pinned)

    def stats(self) -> ArenaStats:
        native = self._arena.stats()
        return ArenaStats(**{name: getattr(native, name) for name in ArenaStats.__annotations__})

    def close(self, *, abandon_views: bool = False) -> None:
        """Close all regions, release all memory. Does nothing when closed already.

        abandon_views: see Region.close(). Raises LifecycleError, before anything is done, while an
        alias set is open, or a region has views, is held or in a transfer, and DriverError, also
        for what regions that were dropped could not give back: then what is closed stays closed,
        and close() may be called again.
        """
        self._arena.close(abandon_views=abandon_views)

    def __repr__(self) -> str:
        return f"Arena({self.device.name!r}, capacity_bytes={self.capacity_bytes})"


class Region(ClosedOnExit, MemoryViews):
    """A stable virtual range of an arena. Physical memory comes with map() and goes with unmap().

    Made by Arena.reserve(). Sizes and offsets are bytes, multiples of the device's granularity.
    A context manager: leaving it closes it; when an error is on its way and views are alive, which
    its traceback may hold, the last of them does.
    """

    def __init__(self, arena: Arena, native: _C.Region) -> None:
        self.arena = arena
        self._region = native

    @property
    def _native(self) -> _C.Region:
        return self._region

    @property
    def _driver(self) -> _C.Driver:
        return self.arena.device._driver

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

    def read_only_ranges(self) -> list[tuple[int, int]]:
        """The parts mapped read-only, whether or not a window for writing is open just now."""
        return self._region.read_only_ranges()

    def map(
        self,
        offset_bytes: int = 0,
        size_bytes: int | None = None,
        *,
        contents: Contents = "zero",
        read_only: bool = False,
    ) -> None:
        """Back a range with physical memory (None: up to the end): all of it, or none on any error.

        contents: what the range shows first. "zero": nothing of another owner; memory that is not
                  this owner's already, or comes from a device that does not promise zeros, is
                  zeroed. "preserve": whatever it holds; the caller's promise to overwrite all that
                  is later read. "poison": 0xff throughout.
        read_only: writing is a fault outside of writable().
        Large handles lie at multiples of the arena's handle_bytes, which are therefore always
        places where unmap may cut.
        Raises ValueError, OutOfMemory (who holds what, what is missing), DriverError,
        LifecycleError (closed, or part of the range is mapped already).
        """
        self.arena.commit([MapStep(self, offset_bytes, size_bytes, contents, read_only)])

    def unmap(self, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        """Take the memory of a range away (None: all that is mapped from the offset on).

        The memory goes back to the arena. Waits for the work that record() has noted, and for no
        other: the device must be done with the range. Raises ValueError, DriverError (all is mapped
        as before), LifecycleError (closed; not mapped; a cut through a handle; held; a transfer on
        the region is in flight).
        """
        self.arena.commit([UnmapStep(self, offset_bytes, size_bytes)])

    def close(self, *, abandon_views: bool = False) -> None:
        """Unmap everything and give the address range up. Does nothing when closed already.

        Waits like unmap(). abandon_views: also while tensors and arrays over the region live; the
        range stays reserved as long as they do, and using them is a fault, never somebody else's
        bytes. Raises LifecycleError (views are alive; held; a transfer is in flight), DriverError:
        all is as before.
        """
        self._region.close(abandon_views=abandon_views)

    def export_handles(self) -> SharedHandles:
        """What another process needs to map what is mapped here; see SharedRegion.

        Until the result is closed, unmap() and close() refuse. Raises ValueError (the arena was
        made without exportable=True), LifecycleError (closed, nothing is mapped), DriverError.
        """
        return SharedHandles._of(self)

    def protect(
        self, offset_bytes: int = 0, size_bytes: int | None = None, *, read_only: bool = True
    ) -> None:
        """Make a mapped range read-only, or writable again (None: all mapped from the offset on).

        Cuts only where unmap may. While a window is open, and while a transfer that writes to it is
        in flight, the memory stays writable. Raises ValueError, LifecycleError, DriverError (all as
        before).
        """
        _require_not_negative("offset_bytes", offset_bytes)
        _require_not_negative("size_bytes", size_bytes)
        self._region.protect(offset_bytes=offset_bytes, size_bytes=size_bytes, read_only=read_only)

    @contextmanager
    def writable(self) -> Iterator[Self]:
        """A window in which read-only parts can be written, to load them. Windows may nest.

        A transfer that begins in a window keeps what it writes writable until it ends, and nothing
        else; another one needs a window of its own, also for the same memory. Raises
        LifecycleError (closed) and DriverError; when that comes at the end of the window, the
        memory stays writable until the next window or protect() ends well.
        """
        self._region.open_window()
        try:
            yield self
        finally:
            self._region.close_window()

    def record(self, stream: int) -> None:
        """Note that work submitted to the stream so far uses the region's memory.

        unmap(), close() and transactions that unmap wait until that work is over, and never for the
        whole device. stream: a raw CUstream (torch: Stream.cuda_stream) or a driver's stream id.
        Raises LifecycleError (closed; the stream is being captured into a graph), DriverError.
        """
        self._region.record(stream)

    @contextmanager
    def hold(self, reason: str) -> Iterator[Self]:
        """Inside the block unmap() and close() refuse: a graph replay in flight, a registration.

        reason: what their LifecycleError says. Raises LifecycleError (closed).
        """
        hold = self._region.hold(reason)
        try:
            yield self
        finally:
            hold.end()

    def add_hooks(
        self, *, before_unmap: Hook | None = None, after_map: Hook | None = None
    ) -> Hooks:
        """Call these when memory goes and comes: for NCCL registrations, RDMA, dma-bufs.

        before_unmap(region, offset_bytes, size_bytes): for every run of mappings that is about to
        go, before anything changes; raising aborts the operation. after_map(...): for every run
        that has been mapped; also for what stays mapped when the operation failed after
        before_unmap, which has to be registered again. Of each mapping a hook hears once, however
        many steps of a plan touch it. Both run on the thread that maps or unmaps,
        without a lock, and so does what ends with them. The region lives until it is closed or its
        hooks are removed.
        """

        def bound(hook: Hook | None) -> Callable[[int, int], None] | None:
            return None if hook is None else lambda offset, size: hook(self, offset, size)

        hook_id = self._region.add_hooks(
            before_unmap=bound(before_unmap), after_map=bound(after_map)
        )
        return Hooks(self._region, hook_id)

    def __repr__(self) -> str:
        return (
            f"Region({self.owner!r}, {self.tag!r}, address={self.address:#x}, "
            f"size_bytes={self.size_bytes}, mapped_bytes={self.mapped_bytes})"
        )


Hook = Callable[[Region, int, int], None]


class Hooks:
    """What Region.add_hooks() returns: remove() takes the hooks away again."""

    def __init__(self, native: _C.Region, hook_id: int) -> None:
        self._region = native
        self._id = hook_id

    def remove(self) -> None:
        """They are not called any more. Does nothing when removed already, or closed."""
        self._region.remove_hooks(self._id)


def _require_not_negative(name: str, value: int | None) -> None:
    if value is not None and value < 0:
        raise ValueError(f"{name}={value} is negative")
