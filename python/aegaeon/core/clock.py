"""Time as the scheduler sees it: seconds from an arbitrary origin, never the wall clock.

Everything that decides by time takes a `Clock`, so that tests and the simulator move it by hand.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """`now()` never goes backwards. Only differences mean anything."""

    def now(self) -> float:
        """Seconds since the clock's origin."""
        ...


class MonotonicClock:
    """The machine's monotonic clock; comparable between processes of one machine."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, duration_s: float) -> None:
        """Move forward. Raises ValueError for a negative duration: a clock that goes back proves
        nothing.
        """
        if not duration_s >= 0:
            raise ValueError(f"a clock only moves forward, got {duration_s} s")
        self._now_s += duration_s

    def set(self, now_s: float) -> None:
        """Move forward to a given time. Raises ValueError for one that has passed."""
        self.advance(now_s - self._now_s)
