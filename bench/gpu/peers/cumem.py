"""Sleep and wake by vLLM's CuMemAllocator (level 1): cumem.py DEVICE BYTES ROUNDS"""

import sys

from weights import cuda_torch, make_weights, measure, skip


def main(device: str, size_bytes: int, num_rounds: int) -> None:
    torch = cuda_torch(device)
    try:
        from vllm.device_allocator.cumem import CuMemAllocator, cumem_available
    except ImportError as error:
        skip(f"vllm is not importable: {error}")
    if not cumem_available:
        skip("this vllm is built without its CUDA allocator")
    allocator = CuMemAllocator.get_instance()
    with allocator.use_memory_pool(tag="weights"):
        weights = make_weights(torch, size_bytes)
    measure(
        torch,
        "vllm",
        weights,
        num_rounds,
        sleep=lambda: allocator.sleep(offload_tags="weights"),
        wake=allocator.wake_up,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
