"""Exceptions of aegaeon_kernels. The native module raises these very classes.

A caller's mistake (a bad size, an unknown device) is a ValueError; everything here is a condition
of the world or a misuse over time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


class Error(Exception):
    """Root of all errors of this package."""


@dataclass(frozen=True)
class RegionRange:
    """A part of a region, by the names it was reserved with."""

    owner: str
    tag: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Evictable:
    """So many bytes of an (owner, tag) that may go."""

    owner: str
    tag: str
    bytes: int


@dataclass(frozen=True)
class Shortage:
    """What a plan lacks, who has it, and what would have to go.

    reason: "capacity"; "owner_maximum": the owner may not have so much; "other_minima": there is
            room, but it is kept for owners that are below their minimum.
    owner, tag: of the first map that does not fit.
    requested_bytes: of all maps of the plan. missing_bytes: with so much more, all of it fits.
    free_bytes, holders: before the plan; (owner, tag): bytes.
    evictable: enough to cover missing_bytes without touching what is pinned, in use, part of the
            plan or below its owner's minimum: one holding that suffices with the least to spare,
            else the largest ones. Empty when nothing would suffice; why_none says so then.
    """

    reason: Literal["capacity", "owner_maximum", "other_minima"]
    owner: str
    tag: str
    requested_bytes: int
    missing_bytes: int
    free_bytes: int
    holders: Mapping[tuple[str, str], int]
    evictable: Sequence[Evictable]
    why_none: str
    message: str


class DriverError(Error):
    """A call of the device driver failed. The operation did not happen; the state is as before.

    That is so unless the way back failed as well. Then the message and these tell what was lost:
    quarantined:   where handles are stuck that the driver would not take back or map again. They
                   are neither free nor owned; every later operation tries to free them.
    lost_contents: whose bytes are gone: no longer mapped, or overwritten before the failure. What
                   the operation itself had mapped is not listed: it held nobody's.

    call: name of the driver call. code: its result (a CUresult). bytes: its size, or 0.
    """

    def __init__(
        self,
        message: str,
        *,
        call: str = "",
        code: int = 0,
        bytes: int = 0,
        quarantined: Sequence[RegionRange] = (),
        lost_contents: Sequence[RegionRange] = (),
    ) -> None:
        super().__init__(message)
        self.call = call
        self.code = code
        self.bytes = bytes
        self.quarantined = quarantined
        self.lost_contents = lost_contents


class OutOfMemory(DriverError, MemoryError):
    """Not enough memory for a mapping or an allocation. The message says who holds what.

    Whoever asked may take memory from somebody (unmap) and try again.
    shortage: what is missing and what would have to go; None when the device itself is out of
              memory, which the arena's books cannot explain.
    """

    def __init__(
        self,
        message: str,
        *,
        call: str = "",
        code: int = 0,
        bytes: int = 0,
        quarantined: Sequence[RegionRange] = (),
        lost_contents: Sequence[RegionRange] = (),
        shortage: Shortage | None = None,
    ) -> None:
        super().__init__(
            message,
            call=call,
            code=code,
            bytes=bytes,
            quarantined=quarantined,
            lost_contents=lost_contents,
        )
        self.shortage = shortage


class LifecycleError(Error):
    """An operation that does not fit the state: use after close, unmap of what is not mapped."""


class IntegrityError(Error):
    """Bytes are not what they were when they were sealed. The holder must not use them."""


class TransferCancelled(Error):
    """Raised by the wait for a transfer that was cancelled."""
