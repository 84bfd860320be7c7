"""What a simulated instance did with its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class InstanceTotals:
    """Seconds by what the device did; the rest is idle. `switches` by path; sums of bytes."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    switch_s: float = 0.0
    turns: int = 0
    prefetches: int = 0
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    switches: Counter[str] = field(default_factory=Counter)

    @property
    def compute_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def busy_s(self) -> float:
        return self.compute_s + self.switch_s


@dataclass(frozen=True, slots=True)
class Span:
    """What an instance did from `start_s` to `end_s`: kind is switch or run."""

    instance: int
    model: str
    kind: str
    start_s: float
    end_s: float
