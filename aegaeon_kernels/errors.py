"""Exceptions of aegaeon_kernels. The native module raises these very classes.

A caller's mistake (a bad size, an unknown device) is a ValueError; everything here is a condition
of the world or a misuse over time.
"""

from __future__ import annotations


class Error(Exception):
    """Root of all errors of this package."""


class DriverError(Error):
    """A call of the device driver failed. The operation did not happen; the state is as before.

    call: name of the driver call. code: its result (a CUresult). bytes: its size, or 0.
    """

    def __init__(self, message: str, *, call: str = "", code: int = 0, bytes: int = 0) -> None:
        super().__init__(message)
        self.call = call
        self.code = code
        self.bytes = bytes


class OutOfMemory(DriverError, MemoryError):
    """Not enough memory for a mapping or an allocation. The message says who holds what.

    Whoever asked may take memory from somebody (unmap) and try again.
    """


class LifecycleError(Error):
    """An operation that does not fit the state: use after close, unmap of what is not mapped."""


class IntegrityError(Error):
    """Bytes are not what they were when they were sealed. The holder must not use them."""


class TransferCancelled(Error):
    """Raised by the wait for a transfer that was cancelled."""
