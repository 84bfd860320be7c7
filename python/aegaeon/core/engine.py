"""What the step loop needs from an engine, and from whoever brings models onto the device.

Both sides are Protocols: vLLM's engine cores implement `Engine` in `aegaeon.vllm_plugin`, the
tests implement it with a few lines of arithmetic, and neither inherits anything from here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EngineLoad:
    """Open requests of one engine, as counts. `num_waiting` have not produced a token yet."""

    num_running: int
    num_waiting: int

    @property
    def num_unfinished(self) -> int:
        return self.num_running + self.num_waiting


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One open request of an engine. prefilled: its prompt is computed. priority: lower is first.

    tokens_done: output tokens so far. ttft_ms, tpot_ms: its own SLO; None: the model's.
    age_s: since it came to the server.
    """

    id: str
    prompt_tokens: int
    tokens_done: int
    prefilled: bool
    priority: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    age_s: float = 0.0


class Engine(Protocol):
    """One model's engine core: its own scheduler and requests, stepped by somebody else."""

    @property
    def name(self) -> str: ...

    def poll(self) -> None:
        """Take in what clients sent since the last call: requests, aborts, control calls."""

    def load(self) -> EngineLoad: ...

    def requests(self) -> Iterable[EngineRequest]:
        """The open requests that `load` counts, oldest first."""

    def has_work(self) -> bool:
        """Whether a step would do anything, be it only the report of a finished request."""

    def run_step(self) -> bool:
        """Run one iteration; the model must be resident. Returns whether the model ran."""

    def fail(self, error: BaseException) -> None:
        """End every open request with `error` and refuse new ones; called at most once."""


class Residency(Protocol):
    """Decides nothing, only does: makes one model's bytes resident, evicting others for it."""

    def is_resident(self, name: str) -> bool: ...

    def missing_bytes(self, name: str) -> int:
        """What `activate` would copy in now; 0 when `name` is resident."""

    def weights_bytes(self, name: str) -> int:
        """The size of its weights, wherever they are."""

    def activate(self, name: str, evict_first: Sequence[str] = ()) -> None:
        """Make `name` resident and current.

        evict_first: models whose memory is taken in this order, where all else is equal.

        Raises an `AegaeonError` or an `aegaeon_kernels.Error` when it cannot; then every model
        is as it was, or at worst evicted with all its bytes safe on the host.
        """

    def prefetch(self, name: str) -> bool:
        """Begin to bring `name` in while the current model runs; whether there is room for it."""

    def let_go(self, name: str) -> None:
        """Take the idle model `name` off the device, unless it is pinned. Raises as `activate`."""
