"""Pause and resume by torch_memory_saver: memory_saver.py DEVICE BYTES ROUNDS"""

import sys

from weights import cuda_torch, make_weights, measure, skip


def main(device: str, size_bytes: int, num_rounds: int) -> None:
    torch = cuda_torch(device)
    try:
        from torch_memory_saver import torch_memory_saver
    except ImportError as error:
        skip(f"torch_memory_saver is not importable: {error}")
    torch_memory_saver.hook_mode = "torch"  # preload needs LD_PRELOAD
    if hasattr(type(torch_memory_saver), "retain_cpu_backup"):
        torch_memory_saver.retain_cpu_backup = True  # at its best: pinned once
    with torch_memory_saver.region(tag="weights", enable_cpu_backup=True):
        weights = make_weights(torch, size_bytes)
    measure(
        torch,
        "torch_memory_saver",
        weights,
        num_rounds,
        sleep=lambda: torch_memory_saver.pause("weights"),
        wake=lambda: torch_memory_saver.resume("weights"),
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
