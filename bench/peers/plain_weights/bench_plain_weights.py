"""For stock vLLM on the CPU: linear layers keep plain weights, as they do in a hosted model.

This folder on PYTHONPATH makes it a plugin of every vLLM process (`vllm.general_plugins`).
"""

import torch


def register() -> None:
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _keep_plain


def _keep_plain(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
