"""What the peer programs share: the tensors of a model, and the answer on standard output."""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

# Of a layer of an 8B model in bf16: qkv, o, gate and up, down.
LAYER_BYTES = [n << 20 for n in (48, 32, 224, 112)]


def skip(reason: str) -> None:
    print(json.dumps({"skipped": reason}))
    sys.exit(0)


def cuda_torch(device: str) -> Any:
    """torch with the device current; ends the program, with the reason, where there is none."""
    try:
        import torch
    except ImportError as error:
        skip(f"torch is not importable: {error}")
    if not torch.cuda.is_available():
        skip("torch has no CUDA device here")
    torch.cuda.set_device(device)
    return torch


def make_weights(torch: Any, size_bytes: int) -> list[Any]:
    weights, left = [], size_bytes
    while left > 0:
        for wanted in LAYER_BYTES:
            size = min(wanted, left)
            if size:
                weights.append(
                    torch.full((size,), len(weights) % 251, dtype=torch.uint8, device="cuda")
                )
            left -= size
    torch.cuda.synchronize()
    return weights


def measure(
    torch: Any,
    distribution: str,
    weights: list[Any],
    num_rounds: int,
    sleep: Callable[[], object],
    wake: Callable[[], object],
) -> None:
    """Sleeps and wakes, checks that the bytes are back, prints the answer."""

    def timed(action: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    sleep_s, wake_s = [], []
    for _ in range(num_rounds):
        sleep_s.append(timed(sleep))
        wake_s.append(timed(wake))
        for i, weight in enumerate(weights):
            if not bool((weight == i % 251).all()):
                raise AssertionError(f"tensor {i} is not what it was")
    print(json.dumps({"version": version(distribution), "sleep_s": sleep_s, "wake_s": wake_s}))
