"""Prefetcher: copies between host images and regions that run while other work goes on.

It knows images, regions, byte ranges and priorities; why something is needed soon is its user's
business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aegaeon_kernels import _C
from aegaeon_kernels._C import TicketState
from aegaeon_kernels.arena import Device, Region
from aegaeon_kernels.errors import Error
from aegaeon_kernels.host_image import HostImage

__all__ = ["DirectionStats", "PrefetchStats", "Prefetcher", "QueueWait", "Ticket", "TicketState"]

# (offset_bytes, size_bytes), or (region_offset_bytes, image_offset_bytes, size_bytes).
Piece = tuple[int, int] | tuple[int, int, int]

DEFAULT_CHUNK_BYTES = 8 << 20
DEFAULT_DEPTH = 2


class Ticket:
    """One transfer. Keeps image, region and the region's memory until its last copy is over.

    States: QUEUED, RUNNING, then DONE; or DRAINING (cancelled or failed, copies still under way),
    then CANCELLED or FAILED.
    """

    def __init__(self, native: _C.Ticket) -> None:
        self._ticket = native

    @property
    def state(self) -> TicketState:
        return self._ticket.state

    @property
    def total_bytes(self) -> int:
        return self._ticket.total_bytes

    @property
    def bytes_done(self) -> int:
        """So many bytes, from the front of the order, have arrived. Cheap, takes no lock."""
        return self._ticket.bytes_done

    @property
    def done(self) -> bool:
        """All bytes have arrived. Never true of a cancelled or failed transfer."""
        return self._ticket.state is TicketState.DONE

    @property
    def error(self) -> Error | None:
        """Why it FAILED or was CANCELLED; None otherwise."""
        try:
            self._ticket.check()
        except Error as error:
            return error
        return None

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when all bytes have arrived.

        Raises what made it fail (DriverError), TransferCancelled, or TimeoutError; after a
        TimeoutError the transfer goes on.
        """
        if not self._ticket.wait(timeout_s=timeout_s):
            raise TimeoutError(f"{self!r} after {timeout_s} s")
        self._ticket.check()

    def wait_bytes(self, num_bytes: int, timeout_s: float | None = None) -> None:
        """Return when the first num_bytes of the order have arrived: a layer, for example.

        Raises ValueError for more than total_bytes, and like wait() when they will not arrive.
        """
        if not 0 <= num_bytes <= self.total_bytes:
            raise ValueError(f"num_bytes={num_bytes} is not within 0..{self.total_bytes}")
        if not self._ticket.wait_bytes(num_bytes, timeout_s=timeout_s):
            raise TimeoutError(f"{self!r} after {timeout_s} s, waiting for {num_bytes}")
        if self.bytes_done < num_bytes:
            self._ticket.check()

    def cancel(self) -> bool:
        """Stop after the chunks that are in flight. False when it had ended before, DONE or FAILED.

        Returns at once; wait() returns (by TransferCancelled) when the last copy is over.
        """
        return self._ticket.cancel()

    def __repr__(self) -> str:
        return f"Ticket({self.state.name}, {self.bytes_done} of {self.total_bytes} bytes)"


@dataclass(frozen=True)
class QueueWait:
    """How long transfers of one priority waited for their first chunk."""

    num_transfers: int
    total_s: float
    max_s: float


@dataclass(frozen=True)
class DirectionStats:
    bytes: int
    num_chunks: int
    num_copies: int  # driver calls; pieces that touch share one
    busy_s: float  # with at least one chunk in flight
    queue_waits: Mapping[int, QueueWait]  # by priority

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes per second of the time it was busy; 0.0 when it never was."""
        return self.bytes / self.busy_s / 1e9 if self.busy_s else 0.0


@dataclass(frozen=True)
class PrefetchStats:
    load: DirectionStats
    store: DirectionStats


class Prefetcher:
    """Copies in the background, most urgent first: one native thread, one stream per direction.

    chunk_bytes: a transfer is cut into chunks of at most this; between two chunks the most urgent
                 transfer is chosen anew. Consecutive small pieces share a chunk.
    depth:       chunks in flight per direction. Cancelling and overtaking wait for so many.

    Not ordered with the device's other work, nor one transfer with another: wait for the ticket.
    A context manager: leaving it closes it.
    """

    def __init__(
        self, device: Device, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, depth: int = DEFAULT_DEPTH
    ) -> None:
        if chunk_bytes <= 0 or depth <= 0:
            raise ValueError(f"chunk_bytes={chunk_bytes} and depth={depth} have to be positive")
        self.device = device
        self._prefetcher = _C.Prefetcher(device._driver, chunk_bytes=chunk_bytes, depth=depth)

    def load(
        self,
        image: HostImage,
        region: Region,
        *,
        priority: int = 0,
        order: Iterable[Piece] | None = None,
    ) -> Ticket:
        """Copy from the image to the region. Returns at once.

        order: pieces in the order in which they are needed, each (offset_bytes, size_bytes), at the
               same offset on both sides, or (region_offset_bytes, image_offset_bytes, size_bytes);
               they do not overlap where they are written. None: the whole image from the front.
        priority: smaller goes first; equal ones in order of arrival.
        Raises ValueError (pieces outside or overlapping, another device), LifecycleError (the
        region is not mapped there, something is closed).
        """
        return self._submit(_C.Direction.LOAD, image, region, priority, order)

    def store(
        self,
        region: Region,
        image: HostImage,
        *,
        priority: int = 0,
        order: Iterable[Piece] | None = None,
    ) -> Ticket:
        """Copy from the region to the image; otherwise like load().

        Raises LifecycleError too when the image is sealed.
        """
        return self._submit(_C.Direction.STORE, image, region, priority, order)

    def _submit(
        self,
        direction: _C.Direction,
        image: HostImage,
        region: Region,
        priority: int,
        order: Iterable[Piece] | None,
    ) -> Ticket:
        pieces = None if order is None else [_three_numbers(piece) for piece in order]
        return Ticket(
            self._prefetcher.submit(
                direction=direction,
                image=image,
                region=region._region,
                priority=priority,
                order=pieces,
            )
        )

    def stats(self) -> PrefetchStats:
        return PrefetchStats(
            load=_direction_stats(self._prefetcher.stats(_C.Direction.LOAD)),
            store=_direction_stats(self._prefetcher.stats(_C.Direction.STORE)),
        )

    def close(self) -> None:
        """Cancel what is queued, wait for what is in flight, end the thread.

        Does nothing when closed already. Raises DriverError when the device does not answer; it
        may be called again.
        """
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _three_numbers(piece: Piece) -> tuple[int, int, int]:
    if any(number < 0 for number in piece):
        raise ValueError(f"piece {piece} is negative")
    if len(piece) == 3:
        return piece
    offset, size = piece
    return offset, offset, size


def _direction_stats(native: _C.DirectionStats) -> DirectionStats:
    return DirectionStats(
        bytes=native.bytes,
        num_chunks=native.num_chunks,
        num_copies=native.num_copies,
        busy_s=native.busy_s,
        queue_waits={
            priority: QueueWait(wait.num_transfers, wait.total_s, wait.max_s)
            for priority, wait in native.queue_waits.items()
        },
    )
