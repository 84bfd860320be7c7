"""A device whose driver calls fail, or wait, when told to.

Nothing is imitated: every call that is not made to fail reaches the real device behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aegaeon_kernels import _C
from aegaeon_kernels.arena import Device

INVALID_VALUE = 1
OUT_OF_MEMORY = 2


class FaultyDevice(Device):
    """Passes driver calls on to `inner`, counts them, and fails those it is told to fail.

    A failing call does not reach the device; it returns its code at once.
    """

    def __init__(self, inner: Device) -> None:
        self._faulty = _C.FaultyDriver(inner._driver)
        self._driver = self._faulty

    def fail_call(
        self,
        n: int,
        *,
        call: str | None = None,
        code: int = INVALID_VALUE,
        persistent: bool = False,
    ) -> None:
        """Make the n-th call from now on fail (counted from 1) with a CUresult.

        call: count and fail only calls of this name ("mem_map"); None: all calls.
        persistent: all matching calls after it fail too.
        """
        if n < 1:
            raise ValueError(f"n={n}: calls are counted from 1")
        self._faulty.fail_call(n=n, call=call, code=code, persistent=persistent)

    def reset(self) -> None:
        """No more failures; the call counters and the list of copies start again."""
        self._faulty.reset()

    @contextmanager
    def holding(self, call: str) -> Iterator[None]:
        """Inside the block, calls of this name wait; after it they go on. Their threads block."""
        self._faulty.hold(call)
        try:
            yield
        finally:
            self._faulty.release()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside the block, every stream says that it is being captured into a graph."""
        self._faulty.set_capturing(True)
        try:
            yield
        finally:
            self._faulty.set_capturing(False)

    @property
    def copies(self) -> list[tuple[str, int, int]]:
        """Copies between host and device since the last reset(), in order of submission.

        (name of the call, device address, bytes).
        """
        return self._faulty.copies

    @property
    def calls(self) -> dict[str, int]:
        """Calls since the last reset(), by name, failed ones included."""
        return self._faulty.calls

    @property
    def num_calls(self) -> int:
        return sum(self.calls.values())

    @property
    def live(self) -> dict[str, int]:
        """Objects that exist through this wrapper, by kind; kinds with none are left out.

        Kinds: handles, reservations, mappings, streams, events, host_allocations,
        registrations (of host memory).
        """
        return {kind: count for kind, count in self._faulty.live.items() if count}
