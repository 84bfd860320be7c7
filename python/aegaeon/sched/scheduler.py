"""The `Policy` interface, its input and its answer.

A policy is a function of (state, now): no clock, no threads, no engine. The live step loop and
the simulator build the same `PoolState` and obey the same `Turn`.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ModelView:
    """One model, as a policy sees it. Times are seconds on the caller's clock."""

    name: str
    num_running: int
    num_waiting: int
    has_work: bool
    resident: bool
    # Not before this time: the last attempt to bring the model in, or to step it, got nowhere.
    blocked_until: float = 0.0

    def runnable(self, now: float) -> bool:
        return self.has_work and self.blocked_until <= now


@dataclass(frozen=True)
class PoolState:
    """All models of an instance in pool order; `last` is the one that had the last turn."""

    models: tuple[ModelView, ...]
    last: str | None = None


@dataclass(frozen=True)
class Turn:
    """Run `model` for up to `max_steps` engine steps; it ends early when the work ends."""

    model: str
    max_steps: int


class Policy(Protocol):
    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        """The next turn, or None when no model can run now."""
