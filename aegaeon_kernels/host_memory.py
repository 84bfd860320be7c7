"""HostPool: host memory that is made and pinned once, at start, for images that come and go.

It knows bytes and who holds them, not what is in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aegaeon_kernels import _C
from aegaeon_kernels._closing import ClosedOnExit
from aegaeon_kernels.arena import Device

# Best first.
KINDS: Mapping[str, _C.HostMemoryKind] = {
    "numa": _C.HostMemoryKind.NUMA,
    "hugetlb": _C.HostMemoryKind.HUGETLB,
    "thp": _C.HostMemoryKind.THP,
    "shm": _C.HostMemoryKind.SHM,
    "driver": _C.HostMemoryKind.DRIVER,
    "pageable": _C.HostMemoryKind.PAGEABLE,
}


@dataclass(frozen=True)
class HostMemory:
    """A kind of host memory, and what came of trying to get it for a device.

    kind: "numa":     allocated by the driver on the device's own NUMA node, by its virtual memory
                      calls (CU_MEM_LOCATION_TYPE_HOST_NUMA)
          "hugetlb":  huge pages that the system has reserved (vm.nr_hugepages), then page-locked
          "thp":      transparent huge pages (of which the remark says how much it got), then
                      locked; a child of fork() does not have them
          "shm":      shared pages, then locked
          "driver":   allocated and locked by the driver in one call: one thread touches all pages
          "pageable": not locked: copies to and from it are correct, and several times slower
    worked: whether it can be had.
    remark: why not; or what is special about it.
    """

    kind: str
    worked: bool
    remark: str

    @staticmethod
    def probe(device: Device) -> tuple[HostMemory, ...]:
        """Try every kind on 2 MiB, best first; nothing is kept."""
        return _from_attempts(_C.probe_host_memory(device._driver))


@dataclass(frozen=True)
class HostPoolStats:
    """A snapshot: sum(holders) + free_bytes == capacity_bytes."""

    capacity_bytes: int
    free_bytes: int
    largest_free_bytes: int  # in one piece
    num_free_parts: int
    holders: Mapping[str, int]  # by the name of the image


class HostPool(ClosedOnExit):
    """Host memory for images, page-locked for a CUDA device before the first of them comes.

    Locking pages is slow and stops other users of the driver, so that all of it happens here: in
    parallel, on huge pages where the system has them. An image taken from the pool is bookkeeping,
    and clearing the bytes that another image has used; it goes back when nothing refers to it any
    more. Thread-safe. A context manager: leaving it closes it.

    capacity_bytes: rounded up to 64 KiB, at which images start too.
    kinds:          which kinds of HostMemory to try, in this order; None: all, best first. The
                    first that gives the whole capacity is taken.
    numa_node:      where the pages of all but "numa" and "driver" should be: the node of the
                    device. None: where the threads happen to run that touch them.
    num_threads:    for touching and clearing pages; None: as the machine has, up to 8.
    piece_bytes:    pages are locked in pieces of this, because drivers and kernels have limits; no
                    copy may touch two pieces (HostImage.copyable_bytes()).

    Raises ValueError, OutOfMemory (also rather than have the system kill processes for memory) and
    DriverError.
    """

    def __init__(
        self,
        device: Device,
        capacity_bytes: int,
        *,
        kinds: Sequence[str] | None = None,
        numa_node: int | None = None,
        num_threads: int | None = None,
        piece_bytes: int = _C.REGISTRATION_PIECE_BYTES,
    ) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes={capacity_bytes} has to be positive")
        if piece_bytes <= 0 or piece_bytes % (2 << 20):
            raise ValueError(f"piece_bytes={piece_bytes} is not a multiple of 2 MiB")
        wanted = list(KINDS) if kinds is None else list(kinds)
        for kind in wanted:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}: expected some of {', '.join(KINDS)}")
        if not wanted:
            raise ValueError("kinds is empty")
        self.device = device
        self._pool = _C.HostPool(
            device._driver,
            capacity_bytes=capacity_bytes,
            kinds=[KINDS[kind] for kind in wanted],
            numa_node=numa_node,
            num_threads=positive_threads(num_threads),
            piece_bytes=piece_bytes,
        )

    @property
    def attempts(self) -> tuple[HostMemory, ...]:
        """The kinds of memory tried, with reasons; the last one is what the pool is made of."""
        return _from_attempts(self._pool.attempts)

    @property
    def kind(self) -> str:
        """What the pool is made of."""
        return self.attempts[-1].kind

    @property
    def pinned(self) -> bool:
        """Page-locked for the device. False for "pageable", and on the host device."""
        return self._pool.pinned

    def stats(self) -> HostPoolStats:
        native = self._pool.stats()
        return HostPoolStats(
            capacity_bytes=native.capacity_bytes,
            free_bytes=native.free_bytes,
            largest_free_bytes=native.largest_free_bytes,
            num_free_parts=native.num_free_parts,
            holders=native.holders,
        )

    def close(self) -> None:
        """Give the memory back to the system. Does nothing when closed already.

        Raises LifecycleError, which says who they are, while there are images in it.
        """
        self._pool.close()

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"HostPool({self.device.name!r}, {self.kind}, "
            f"{stats.free_bytes} of {stats.capacity_bytes} bytes free)"
        )


def positive_threads(num_threads: int | None) -> int:
    """The number to use. Raises ValueError for one that is not positive."""
    if num_threads is None:
        return _C.default_num_threads()
    if num_threads <= 0:
        raise ValueError(f"num_threads={num_threads} has to be positive")
    return num_threads


def _from_attempts(attempts: Sequence[_C.HostMemoryAttempt]) -> tuple[HostMemory, ...]:
    names = {native: name for name, native in KINDS.items()}
    return tuple(HostMemory(names[a.kind], a.worked, a.remark) for a in attempts)
