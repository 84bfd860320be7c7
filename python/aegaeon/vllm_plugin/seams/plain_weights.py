"""On the CPU, linear layers keep plain weight tensors instead of packed ones."""

from typing import Any

import torch

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


def _use_plain_weights() -> None:
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _plain_gemm


def _plain_gemm(layer: Any, remove_weight: bool) -> None:
    """What vLLM itself does for layers it does not pack (`_cpu_skip_gemm_dispatch`)."""
    layer.cpu_linear = torch.nn.functional.linear


SEAM = Seam(
    name="plain_weights",
    tier=Tier.PRIVATE,
    why="packed GEMM weights live in opaque buffers of oneDNN, which cannot be placed in a region; "
    "plain tensors compute the same values, more slowly at small batches",
    how="dispatch_cpu_unquantized_gemm, which vLLM looks up at call time, is replaced",
    upstream_link="https://github.com/vllm-project/vllm/pull/24150",
    remove_when="packed weights can be placed in memory of our own",
    relies_on=(
        Upstream(
            "vllm.model_executor.layers.utils",
            "dispatch_cpu_unquantized_gemm",
            ("layer", "remove_weight"),
        ),
    ),
    apply=_use_plain_weights,
)
