"""On the CPU, a seeded request may have a prompt longer than a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


@contextmanager
def without_discarded_draws(runner: Any) -> Iterator[None]:
    """Inside, requests whose prompt the step does not end have no generator of their own.

    The token that is sampled for them is thrown away, so it may as well come from the generator of
    the process, of which the CPU sampler takes a number for each request of the batch anyhow.
    """
    generators = runner.input_batch.generators
    discarded = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
    held = {index: generators.pop(index) for index in discarded.tolist() if index in generators}
    try:
        yield
    finally:
        generators.update(held)


def _sample_without_discarded_draws() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample = CPUModelRunner.sample_tokens

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        with without_discarded_draws(self):
            return sample(self, grammar_output)

    CPUModelRunner.sample_tokens = sample_tokens


SEAM = Seam(
    name="seeded_chunks",
    tier=Tier.PRIVATE,
    why="vLLM turns the generator of a request back when a sampled token is thrown away, by an "
    "offset that only generators of a GPU have: on a CPU one seeded request with a prompt longer "
    "than max_num_batched_tokens ends the engine",
    how="the CPU runner samples such a token from the generator of the process",
    upstream_link="https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/gpu_model_runner.py",
    remove_when="vLLM's CPU runner turns generators back, or does not draw for such requests",
    relies_on=(
        Upstream("vllm.v1.worker.cpu_model_runner", "CPUModelRunner"),
        Upstream(
            "vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", ("grammar_output",)
        ),
        Upstream("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.discard_request_mask"),
        Upstream("vllm.v1.worker.gpu_input_batch", "InputBatch.generators"),
        Upstream("vllm.v1.worker.gpu_input_batch", "InputBatch.num_reqs"),
    ),
    apply=_sample_without_discarded_draws,
)
