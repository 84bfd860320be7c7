"""Who had the device, and for what: totals since the start, and the last minutes in slices.

Written by the step loop once per turn; readable from any thread. Slices instead of turns, because a
pool of small models makes thousands of turns in a second, and what is kept here must stay small.
"""

import math
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

SLICE_S = 0.25
SLICES_KEPT = 480


@dataclass
class ModelUsage:
    """What one model got since the start. Seconds of the device, apart by what they went into."""

    turns: int = 0
    steps: int = 0
    switch_s: float = 0.0
    step_s: float = 0.0


class Share(NamedTuple):
    """Seconds of one slice that went into switches to a model, and into its steps."""

    switch_s: float
    step_s: float


class DeviceUsage:
    """Turns, summed up. slice_s: the resolution of what `slices` tells."""

    def __init__(self, slice_s: float = SLICE_S, num_slices: int = SLICES_KEPT) -> None:
        self.slice_s = slice_s
        self._totals: dict[str, ModelUsage] = {}
        self._slices: deque[tuple[int, dict[str, Share]]] = deque(maxlen=num_slices)
        self._lock = threading.Lock()

    def add(
        self, model: str, *, began_s: float, switched_s: float, ended_s: float, num_steps: int
    ) -> None:
        """A turn: from `began_s` a switch to `model`, from `switched_s` to `ended_s` its steps."""
        with self._lock:
            total = self._totals.setdefault(model, ModelUsage())
            total.turns += 1
            total.steps += num_steps
            total.switch_s += switched_s - began_s
            total.step_s += ended_s - switched_s
            oldest_s = ended_s - self.slice_s * (self._slices.maxlen or 0)
            for index in range(self._index(max(began_s, oldest_s)), self._index(ended_s) + 1):
                low, high = index * self.slice_s, (index + 1) * self.slice_s
                switch_s = max(0.0, min(switched_s, high) - max(began_s, low))
                step_s = max(0.0, min(ended_s, high) - max(switched_s, low))
                if switch_s or step_s:
                    self._add_share(index, model, switch_s, step_s)

    def totals(self) -> dict[str, ModelUsage]:
        """By model; those that never had a turn are missing."""
        with self._lock:
            return {name: replace(total) for name, total in self._totals.items()}

    def slices(self, since: int = 0) -> list[tuple[int, dict[str, Share]]]:
        """(number, share of each model), oldest first, from number `since` on.

        Slice k lasts from k * slice_s on the loop's clock; those in which nothing ran are missing.
        The last one may still grow: ask for it again.
        """
        with self._lock:
            return [(index, dict(shares)) for index, shares in self._slices if index >= since]

    def _index(self, time_s: float) -> int:
        return math.floor(time_s / self.slice_s)

    def _add_share(self, index: int, model: str, switch_s: float, step_s: float) -> None:
        if not self._slices or self._slices[-1][0] < index:
            self._slices.append((index, {}))
        shares = self._slices[-1][1]
        before = shares.get(model, Share(0.0, 0.0))
        shares[model] = Share(before.switch_s + switch_s, before.step_s + step_s)
