"""The `Policy` interface, its input and its answer.

A policy decides from (state, now) and its own earlier decisions: no clock, no threads, no engine,
no chance. The live step loop and the simulator build the same `PoolState` and obey the same `Turn`.
All times are seconds on the caller's clock, all sizes bytes.
"""

import math
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from aegaeon.sched.cost import CostModel

UNLIMITED_STEPS = sys.maxsize


class Phase(StrEnum):
    """What an instance does for its requests: computes prompts, the tokens after them, or both."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class RequestView:
    """One open request, as a policy sees it.

    tokens_done: output tokens so far. prefilled: its prompt is computed (it decodes).
    ttft_s, tpot_s: its SLO; token k (from 0) is due at `arrival_s + ttft_s + k * tpot_s`.
    priority: lower runs earlier.
    """

    id: str
    arrival_s: float
    prompt_tokens: int
    tokens_done: int = 0
    prefilled: bool = False
    ttft_s: float = 10.0
    tpot_s: float = 0.1
    priority: int = 0

    @property
    def due_s(self) -> float:
        """When its next token is due."""
        return self.arrival_s + self.ttft_s + self.tokens_done * self.tpot_s


@dataclass(frozen=True, slots=True)
class Work:
    """The open requests of one model in sum, so that a decision costs nothing per request.

    oldest_arrival_s: of all open requests. oldest_waiting_s: of those not prefilled.
    first_dues_s: when the first tokens of those not prefilled are due, sorted; next_dues_s: the
    next tokens of those that decode. tpot_s: the tightest. priority: the most urgent (lowest).
    first_prompt_tokens: prompt of the request that is prefilled next; prefill_tokens: of all that
    are not prefilled; context_tokens: prompts and outputs of those that decode.
    """

    oldest_arrival_s: float = math.inf
    oldest_waiting_s: float = math.inf
    first_dues_s: tuple[float, ...] = ()
    next_dues_s: tuple[float, ...] = ()
    tpot_s: float = math.inf
    priority: int = 0
    first_prompt_tokens: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0

    @property
    def first_due_s(self) -> float:
        """When the earliest first token is due; never when none is."""
        return self.first_dues_s[0] if self.first_dues_s else math.inf

    @property
    def next_due_s(self) -> float:
        """When the earliest token of those that decode is due; never when none is."""
        return self.next_dues_s[0] if self.next_dues_s else math.inf


NO_WORK = Work()


class ModelView(NamedTuple):
    """One model, as a policy sees it. A tuple, as the cheapest to make: one per model and turn.

    num_running: requests that decode; num_waiting: those whose prompt is still to be computed.
    missing_bytes: what a switch to it must bring in now (0: it is hot), without what has been
    prefetched. kv_bytes: its KV cache on the device, when resident. resident_since: None when not.
    last_run_s: when its last turn ended; None before its first.
    """

    name: str
    num_running: int
    num_waiting: int
    has_work: bool
    resident: bool
    # Not before this time: the last attempt to bring the model in, or to step it, got nowhere.
    blocked_until: float = 0.0
    work: Work = NO_WORK
    weights_bytes: int = 0
    kv_bytes: int = 0
    missing_bytes: int = 0
    pinned: bool = False
    resident_since: float | None = None
    last_run_s: float | None = None

    def runnable(self, now: float) -> bool:
        return self.has_work and self.blocked_until <= now


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that came since the last decision."""

    model: str
    request: RequestView


@dataclass(frozen=True, slots=True)
class PoolState:
    """All models of an instance in pool order; `last` is the one that had the last turn.

    free_bytes, capacity_bytes: of the device. arrived: since the last decision, oldest first; they
    are counted in `models` already.
    """

    models: tuple[ModelView, ...]
    last: str | None = None
    free_bytes: int = 0
    capacity_bytes: int = 0
    costs: CostModel = field(default_factory=CostModel)
    arrived: tuple[Arrival, ...] = ()

    @property
    def link_bytes_per_s(self) -> float:
        return self.costs.link_bytes_per_s


@dataclass(frozen=True, slots=True)
class Turn:
    """Run `model` for up to `max_steps` engine steps and `quota_s` seconds, whichever ends first.

    The clock of the quota starts with the first step, after the switch, and is read after each
    step. A turn ends early when its work ends. A step of phase PREFILL computes the prompt of one
    request, the oldest; of DECODE one token of each prefilled request; BOTH is the engine's choice.
    prefetch: models to bring in meanwhile, most urgent first. evict_first: victims, if any are
    needed, in this order among those that cost the same to bring back, and before those not named.
    admit, refuse: ids of requests in `state.arrived`.
    """

    model: str
    max_steps: int = UNLIMITED_STEPS
    quota_s: float = math.inf
    phase: Phase = Phase.BOTH
    prefetch: tuple[str, ...] = ()
    evict_first: tuple[str, ...] = ()
    admit: tuple[str, ...] = ()
    refuse: tuple[str, ...] = ()


class Policy(Protocol):
    def next_turn(self, state: PoolState, now: float) -> Turn | None:
        """The next turn, or None when no model can run now."""
