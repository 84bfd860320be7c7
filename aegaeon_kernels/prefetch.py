"""Prefetcher: copies between host images and regions that run while other work goes on.

It knows images, regions, byte ranges and priorities; why something is needed soon is its user's
business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias, cast

from aegaeon_kernels import _C
from aegaeon_kernels._C import TicketState
from aegaeon_kernels._closing import ClosedOnExit
from aegaeon_kernels._streams import StreamLike, stream_handle
from aegaeon_kernels.arena import Device, Region
from aegaeon_kernels.errors import Error
from aegaeon_kernels.host_image import HostImage

__all__ = [
    "DirectionStats",
    "Durations",
    "PrefetchStats",
    "Prefetcher",
    "Ticket",
    "TicketState",
]

DEFAULT_CHUNK_BYTES = 8 << 20
DEFAULT_DEPTH = 2

# (offset_bytes, size_bytes), or (region_offset_bytes, image_offset_bytes, size_bytes).
Piece: TypeAlias = tuple[int, int] | tuple[int, int, int]
Order: TypeAlias = Iterable[Piece | Sequence[Piece]]  # of layers: a piece, or several


class _Unchanged(Enum):
    UNCHANGED = 0


UNCHANGED: Final = _Unchanged.UNCHANGED


class Ticket:
    """One transfer. Keeps image, region and the region's memory until its last copy is over.

    States: QUEUED, RUNNING, then DONE; or DRAINING (cancelled or failed, copies still under way),
    then CANCELLED or FAILED. Safe to use from several threads.

    Progress is a number of bytes from the front of the order; what waits for a layer or a range
    waits for the bytes that bring it.
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

    @property
    def num_layers(self) -> int:
        """Entries of the order; 1 without one."""
        return self._ticket.num_layers

    def layer_done(self, layer_idx: int) -> bool:
        """That entry of the order has arrived, and all before it. Cheap, takes no lock."""
        return self.bytes_done >= self._bytes_through_layer(layer_idx)

    def ranges_done(self) -> list[tuple[int, int]]:
        """Where bytes have arrived: (offset_bytes, size_bytes), by offset, those that touch joined.

        Offsets of the side that is written: of the region for a load, of the image for a store.
        """
        return self._ticket.ranges_done()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when all bytes have arrived.

        Raises what made it fail (DriverError), TransferCancelled, or TimeoutError; after a
        TimeoutError the transfer goes on.
        """
        if not self._ticket.wait(timeout_s=timeout_s):
            raise TimeoutError(f"{self!r} after {timeout_s} s")
        self._ticket.check()

    def wait_bytes(self, num_bytes: int, timeout_s: float | None = None) -> None:
        """Return when the first num_bytes of the order have arrived.

        Raises ValueError for more than total_bytes, and like wait() when they will not arrive.
        """
        self._require_within(num_bytes)
        if not self._ticket.wait_bytes(num_bytes, timeout_s=timeout_s):
            raise TimeoutError(f"{self!r} after {timeout_s} s, waiting for {num_bytes}")
        if self.bytes_done < num_bytes:
            self._ticket.check()

    def wait_layer(self, layer_idx: int, timeout_s: float | None = None) -> None:
        """Return when that entry of the order has arrived, and all before it.

        Raises ValueError when there is none, else like wait_bytes().
        """
        self.wait_bytes(self._bytes_through_layer(layer_idx), timeout_s)

    def wait_range(
        self, offset_bytes: int, size_bytes: int, timeout_s: float | None = None
    ) -> None:
        """Return when those bytes have arrived, whichever pieces bring them.

        offset_bytes: in what is written: the region for a load, the image for a store.
        Raises ValueError when the order does not bring all of them, else like wait_bytes().
        """
        if offset_bytes < 0 or size_bytes < 0:
            raise ValueError(f"the range ({offset_bytes}, {size_bytes}) is negative")
        needed = self._ticket.bytes_through(offset_bytes=offset_bytes, size_bytes=size_bytes)
        self.wait_bytes(needed, timeout_s)

    def wait_on_stream(
        self,
        stream: StreamLike,
        *,
        num_bytes: int | None = None,
        layer: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Make a device stream wait for a part of the transfer: its first bytes, or a layer.

        What is put on the stream after this call runs when those copies are over; the host does
        not wait for them. It does wait until they have been handed to the device: with `depth`
        chunks in flight that is about so many chunks before they arrive. A first layer can so run
        while the last is still under way, from a loop of wait_on_stream(s, layer=i) and launches.

        stream: of torch, of CuPy, or a handle; of the prefetcher's device.
        num_bytes, layer: one of them; neither means all of the transfer.

        A transfer that fails after this call lets the stream go on: before results are used, ask
        for `error`. Raises ValueError (beyond the order), LifecycleError (the stream is being
        captured into a graph), DriverError, and like wait() when those copies will not be made.
        """
        if num_bytes is not None and layer is not None:
            raise ValueError("give num_bytes or layer, not both")
        if layer is not None:
            num_bytes = self._bytes_through_layer(layer)
        if num_bytes is None:
            num_bytes = self.total_bytes
        self._require_within(num_bytes)
        handle = stream_handle(stream)
        if not self._ticket.wait_submitted(num_bytes, timeout_s=timeout_s):
            raise TimeoutError(f"{self!r} after {timeout_s} s, waiting to be at {num_bytes}")
        self._ticket.wait_on_stream(stream=handle, num_bytes=num_bytes)

    @property
    def priority(self) -> int:
        return self._ticket.priority

    def set_priority(self, priority: int) -> bool:
        """From the next chunk on. False when all chunks are with the device, or it has ended."""
        return self._ticket.set_priority(priority)

    def set_deadline(self, deadline_s: float | None) -> bool:
        """As in load(), counted from now; None: no deadline. False as set_priority()."""
        _require_number("deadline_s", deadline_s)
        return self._ticket.set_deadline(deadline_s)

    def cancel(self) -> bool:
        """Stop after the chunks that are in flight. False when it had ended before, DONE or FAILED.

        Returns at once; wait() returns (by TransferCancelled) when the last copy is over.
        """
        return self._ticket.cancel()

    def _bytes_through_layer(self, layer_idx: int) -> int:
        if not 0 <= layer_idx < self.num_layers:
            raise ValueError(f"layer {layer_idx} is not within 0..{self.num_layers - 1}")
        return self._ticket.bytes_through_layer(layer_idx)

    def _require_within(self, num_bytes: int) -> None:
        if not 0 <= num_bytes <= self.total_bytes:
            raise ValueError(f"num_bytes={num_bytes} is not within 0..{self.total_bytes}")

    def __repr__(self) -> str:
        return f"Ticket({self.state.name}, {self.bytes_done} of {self.total_bytes} bytes)"


@dataclass(frozen=True)
class Durations:
    """How long something took, over all times that it happened; quantiles up to 1/8 too long."""

    num: int
    total_s: float
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True)
class DirectionStats:
    """Since the prefetcher began. Transfers still under way are in no num_."""

    bytes: int
    num_chunks: int
    num_copies: int  # driver calls; pieces that touch share one
    busy_s: float  # with at least one chunk in flight
    throttled_s: float  # with a chunk that the rate limit alone held back
    num_done: int
    num_late: int  # of those that are done: after their deadline
    num_cancelled: int
    num_failed: int
    queue_waits: Mapping[int, Durations]  # from load() or store() to the first chunk, by priority
    cancel_latencies: Durations  # from cancel() to the end of the last copy, where one was running

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes per second of the time it was busy; 0.0 when it never was."""
        return self.bytes / self.busy_s / 1e9 if self.busy_s else 0.0


@dataclass(frozen=True)
class PrefetchStats:
    load: DirectionStats
    store: DirectionStats


class Prefetcher(ClosedOnExit):
    """Copies in the background, most urgent first: one native thread, one stream per direction.

    chunk_bytes: a transfer is cut into chunks of at most this; between two chunks the most urgent
                 transfer is chosen anew. Consecutive small pieces share a chunk.
    depth:       chunks in flight per direction. Cancelling and overtaking wait for so many.
    max_bytes_per_s: limit for each direction, so that copies leave memory bandwidth and link to
                 others (None: none). Kept over any time to within two chunks, which go at the full
                 rate of the link; smaller chunks spread the load better.
    cap_exempt_priority: transfers of this priority, and more urgent ones, go without limit, and do
                 not count towards it (None: no exemption).

    Copies are not ordered with the device's other work, nor one transfer with another, but for
    what `after` and Ticket.wait_on_stream() ask. A context manager: leaving it closes it.
    """

    def __init__(
        self,
        device: Device,
        *,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        depth: int = DEFAULT_DEPTH,
        max_bytes_per_s: float | None = None,
        cap_exempt_priority: int | None = None,
    ) -> None:
        if chunk_bytes <= 0 or depth <= 0:
            raise ValueError(f"chunk_bytes={chunk_bytes} and depth={depth} have to be positive")
        self.device = device
        self._prefetcher = _C.Prefetcher(
            device._driver,
            chunk_bytes=chunk_bytes,
            depth=depth,
            max_bytes_per_s=max_bytes_per_s,
            cap_exempt_priority=cap_exempt_priority,
        )

    def load(
        self,
        image: HostImage,
        region: Region,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        order: Order | None = None,
        after: StreamLike | None = None,
    ) -> Ticket:
        """Copy from the image to the region. Returns at once.

        order: pieces in the order in which they are needed, each (offset_bytes, size_bytes), at the
               same offset on both sides, or (region_offset_bytes, image_offset_bytes, size_bytes);
               they do not overlap where they are written. An entry may also be a sequence of
               pieces; each entry is a layer to the ticket. None: the whole image from the front.
        priority: smaller goes first. Chosen anew at every chunk.
        deadline_s: seconds from now; within a priority the earliest goes first, and those without
               one last, in order of arrival. Nothing is dropped when it is late.
        after: a stream; the first copy waits for the work that is on it now. Other transfers
               overtake this one meanwhile.
        Raises ValueError (pieces outside or overlapping, another device), LifecycleError (the
        region is not mapped there, something is closed, the stream is being captured into a graph).
        """
        return self._submit(_C.Direction.LOAD, image, region, priority, deadline_s, order, after)

    def store(
        self,
        region: Region,
        image: HostImage,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        order: Order | None = None,
        after: StreamLike | None = None,
    ) -> Ticket:
        """Copy from the region to the image; otherwise like load().

        Raises LifecycleError too when the image is sealed.
        """
        return self._submit(_C.Direction.STORE, image, region, priority, deadline_s, order, after)

    def _submit(
        self,
        direction: _C.Direction,
        image: HostImage,
        region: Region,
        priority: int,
        deadline_s: float | None,
        order: Order | None,
        after: StreamLike | None,
    ) -> Ticket:
        _require_number("deadline_s", deadline_s)
        pieces, layer_ends = _flattened(order)
        return Ticket(
            self._prefetcher.submit(
                direction=direction,
                image=image,
                region=region._region,
                priority=priority,
                deadline_s=deadline_s,
                order=pieces,
                layer_ends=layer_ends,
                after=None if after is None else stream_handle(after),
            )
        )

    def set_rate(
        self,
        *,
        load: float | _Unchanged | None = UNCHANGED,
        store: float | _Unchanged | None = UNCHANGED,
    ) -> None:
        """Limit a direction to so many bytes per second from its next chunk on; None: no limit.

        Raises ValueError for less than 1.
        """
        for direction, rate in ((_C.Direction.LOAD, load), (_C.Direction.STORE, store)):
            if not isinstance(rate, _Unchanged):
                self._prefetcher.set_rate(direction, max_bytes_per_s=rate)

    def set_chunk_bytes(self, chunk_bytes: int) -> None:
        """Cut into chunks of at most this from the next one on.

        Small ones let others in sooner, large ones use the link better: a chunk of t seconds with
        a gap of o seconds to the next leaves t/(t+o) of it.
        """
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes={chunk_bytes} has to be positive")
        self._prefetcher.set_chunk_bytes(chunk_bytes)

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


def _flattened(order: Order | None) -> tuple[list[tuple[int, int, int]] | None, list[int] | None]:
    """All pieces, and how many of them end with each layer."""
    if order is None:
        return None, None
    pieces: list[tuple[int, int, int]] = []
    layer_ends: list[int] = []
    for entry in order:
        if entry and isinstance(entry[0], int):
            pieces.append(_three_numbers(cast(Piece, entry)))
        else:
            pieces.extend(_three_numbers(piece) for piece in cast(Sequence[Piece], entry))
        layer_ends.append(len(pieces))
    return pieces, layer_ends


def _three_numbers(piece: Piece) -> tuple[int, int, int]:
    if any(number < 0 for number in piece):
        raise ValueError(f"piece {piece} is negative")
    if len(piece) == 3:
        return piece
    offset, size = piece
    return offset, offset, size


def _require_number(name: str, value: float | None) -> None:
    if value is not None and math.isnan(value):
        raise ValueError(f"{name}={value} is not a number")


def _durations(native: _C.DurationHistogram) -> Durations:
    return Durations(
        num=native.num,
        total_s=native.total_s,
        p50_s=native.quantile_s(0.5),
        p99_s=native.quantile_s(0.99),
        max_s=native.max_s,
    )


def _direction_stats(native: _C.DirectionStats) -> DirectionStats:
    return DirectionStats(
        bytes=native.bytes,
        num_chunks=native.num_chunks,
        num_copies=native.num_copies,
        busy_s=native.busy_s,
        throttled_s=native.throttled_s,
        num_done=native.num_done,
        num_late=native.num_late,
        num_cancelled=native.num_cancelled,
        num_failed=native.num_failed,
        queue_waits={priority: _durations(waits) for priority, waits in native.queue_waits.items()},
        cancel_latencies=_durations(native.cancel_latencies),
    )
