"""State that vLLM keeps per process and that must follow the current model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


@dataclass(frozen=True)
class ProcessState:
    """Random generators (unseeded sampling draws from them) and vLLM's workspace of one model."""

    torch_rng: torch.Tensor
    cuda_rng: torch.Tensor | None
    numpy_rng: dict[str, Any]
    workspace: Any

    @classmethod
    def capture(cls) -> "ProcessState":
        from vllm.v1.worker import workspace

        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            torch_rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state() if on_gpu else None,
            numpy_rng=np.random.get_state(legacy=False),
            workspace=workspace._manager,
        )

    def restore(self) -> None:
        from vllm.v1.worker import workspace

        torch.set_rng_state(self.torch_rng)
        if self.cuda_rng is not None:
            torch.cuda.set_rng_state(self.cuda_rng)
        np.random.set_state(self.numpy_rng)
        workspace._manager = self.workspace


class ProcessStates:
    """One `ProcessState` per model, exchanged when the current model changes."""

    def __init__(self) -> None:
        self._states: dict[str, ProcessState] = {}

    def exchange(self, previous: str | None, current: str) -> None:
        """Keep the process's state for `previous`, install that of `current` if it has one."""
        if previous is not None:
            self._states[previous] = ProcessState.capture()
        state = self._states.get(current)
        if state is not None:
            state.restore()

    def forget(self, name: str) -> None:
        self._states.pop(name, None)


SEAM = Seam(
    name="process_state",
    tier=Tier.PRIVATE,
    why="a model served beside others must draw the same random numbers, and use the same "
    "workspace, as when it is served alone",
    how="torch's and numpy's generators and vLLM's workspace manager are exchanged when the "
    "current model changes",
    upstream_link="https://github.com/vllm-project/vllm/issues/299",
    remove_when="vLLM keeps this state per engine core",
    relies_on=(Upstream("vllm.v1.worker.workspace", "_manager"),),
)
