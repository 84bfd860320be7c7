"""On the CPU, requests without an adapter are answered by the model alone, in any batch."""

from collections.abc import Callable
from typing import Any

import torch

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream


def without_rows_of_nobody(expand: Callable[..., Any]) -> Callable[..., Any]:
    """`expand` adds nothing to rows whose slot is -1."""

    def masked(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        nobody = (lora_indices_tensor < 0).unsqueeze(-1)
        inputs = inputs.masked_fill(nobody, 0)
        return expand(inputs, lora_b_weights, output_tensor, lora_indices_tensor, *args, **kwargs)

    return masked


def _mask_rows() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_expand", "bgmv_expand_slice"):
        masked = without_rows_of_nobody(getattr(lora_ops, name))
        setattr(lora_ops, name, masked)  # also what sgmv_expand and sgmv_expand_slice call
        setattr(punica_cpu, name, masked)


_ARGUMENTS = ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor")

SEAM = Seam(
    name="lora_base_rows",
    tier=Tier.PRIVATE,
    why="vLLM marks a request without an adapter by the slot -1, and its CPU operations take that "
    "for the last slot: in a batch with others, the base model's requests get the adapter that "
    "happens to lie there",
    how="the two operations that add an adapter's part to a row add nothing for the slot -1",
    upstream_link="https://github.com/vllm-project/vllm/blob/main/vllm/lora/ops/torch_ops/lora_ops.py",
    remove_when="vLLM's CPU operations leave rows of slot -1 alone",
    relies_on=(
        Upstream("vllm.lora.ops.torch_ops.lora_ops", "bgmv_expand", (*_ARGUMENTS, "add_inputs")),
        Upstream(
            "vllm.lora.ops.torch_ops.lora_ops",
            "bgmv_expand_slice",
            (*_ARGUMENTS, "slice_offset", "slice_size", "add_inputs"),
        ),
        Upstream("vllm.lora.punica_wrapper.punica_cpu", "bgmv_expand"),
        Upstream("vllm.lora.punica_wrapper.punica_cpu", "bgmv_expand_slice"),
    ),
    apply=_mask_rows,
)
