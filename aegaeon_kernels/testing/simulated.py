"""A device with a simulated clock and copy engines: exact times, and work done at the last moment.

Memory is the host device's. What is put on a stream takes the time that the link says, on a clock
that moves only when somebody waits for the work; its bytes move only when somebody has waited for
them. Who forgets to wait sees old bytes, every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from aegaeon_kernels import _C
from aegaeon_kernels.arena import Device


class SimulatedCopy(NamedTuple):
    """A copy between host and device; times in seconds of the simulated clock."""

    call: str
    device_address: int
    size_bytes: int
    submitted_s: float
    begin_s: float  # on the engine
    end_s: float


class ClockLimit:
    """See SimulatedDevice.clock_limit()."""

    def __init__(self, simulated: _C.SimulatedDriver) -> None:
        self._simulated = simulated

    def move(self, limit_s: float) -> None:
        self._simulated.hold_clock(limit_s)

    def reach(self) -> None:
        """Return when the clock is there: when somebody waits for a later time.

        Raises TimeoutError when nobody does within a minute.
        """
        if not self._simulated.await_held():
            raise TimeoutError(f"nobody waits for a later time than {self._simulated.now_s} s")


class SimulatedDevice(Device):
    """One copy engine per direction, first come first served, on a clock that starts at 0.

    memory_bytes:    capacity.
    bytes_per_s:     of each engine; by default a PCIe 5 x16 link.
    copy_overhead_s: what each copy takes of its engine beside its bytes.
    wake_latency_s:  from the end of the work until somebody who waits for it goes on.
    """

    def __init__(
        self,
        *,
        memory_bytes: int,
        bytes_per_s: float = 55.6e9,
        copy_overhead_s: float = 0.0,
        wake_latency_s: float = 0.0,
    ) -> None:
        if bytes_per_s <= 0 or copy_overhead_s < 0 or wake_latency_s < 0:
            raise ValueError("bytes_per_s has to be positive, overhead and latency not negative")
        self._simulated = _C.SimulatedDriver(
            Device("host", memory_bytes=memory_bytes)._driver,
            bytes_per_s=bytes_per_s,
            copy_overhead_s=copy_overhead_s,
            wake_latency_s=wake_latency_s,
        )
        self._driver = self._simulated

    @property
    def now_s(self) -> float:
        return self._simulated.now_s

    def advance(self, time_s: float) -> None:
        """Move the clock; what is over by then has happened."""
        self._simulated.advance(time_s)

    @contextmanager
    def clock_limit(self, limit_s: float) -> Iterator[ClockLimit]:
        """Inside the block nobody's waiting moves the clock beyond this time."""
        limit = ClockLimit(self._simulated)
        limit.move(limit_s)
        try:
            yield limit
        finally:
            self._simulated.release_clock()

    def compute(self, stream: int, time_s: float) -> None:
        """Keep a stream busy for so long, as a kernel would."""
        code = self._simulated.compute(stream, duration_s=time_s)
        if code != 0:
            raise ValueError(f"stream {stream}: {self._simulated.describe(code)}")

    @property
    def copies(self) -> list[SimulatedCopy]:
        """All copies between host and device, in order of submission."""
        return [SimulatedCopy(*copy) for copy in self._simulated.copies]
