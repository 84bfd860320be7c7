"""The KV cache is a tensor over a region of the arena, at an address that never changes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.kv_cache_layout import KVCacheLayout

from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream
from aegaeon_kernels.kv_layout import KVLayout, Plane


class KVAllocation(TorchFunctionMode):
    """Redirects vLLM's one allocation of KV memory, `torch.zeros(n, dtype=int8)`.

    make: (size in bytes) -> zeroed 1-D int8 tensor of that size. Everything else that runs inside
    the context is untouched.
    """

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._make = make

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.zeros
            and len(args) == 1
            and isinstance(args[0], int)
            and kwargs.get("dtype") is torch.int8
        ):
            return self._make(args[0])
        return func(*args, **kwargs)


def block_outermost_first(supported: Sequence[str], always: Sequence[str] = ()) -> list[str]:
    """`supported` names of KV cache layouts, and those of `always`, in our order of preference.

    With the block as the outermost dimension all layers of a block are one run of bytes: one copy,
    and what lies past the last block in use can be given away.
    """
    names = [*always, *(name for name in supported if name not in always)]
    return sorted(names, key=lambda name: not KVCacheLayout[name].is_block_outermost)


def layouts_of(kv_cache_config: Any) -> tuple[KVLayout, ...]:
    """Where the blocks of all layers lie in the one allocation, from vLLM's own description.

    Cache groups may overlay each other, since a block id belongs to one group at a time; planes
    that coincide are kept once.
    """
    planes: dict[tuple[int, int, int], set[Plane]] = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        spec = _spec_of(kv_cache_config, tensor.layers[0])
        key = (spec.page_size_bytes, kv_cache_config.num_blocks_of(tensor), tensor.size)
        planes.setdefault(key, set()).update(
            Plane(tensor.offset + index * tensor.layer_stride, tensor.block_stride)
            for index in range(len(tensor.layers))
        )
    return tuple(
        KVLayout(
            planes=tuple(sorted(group)),
            block_bytes=page_bytes,
            num_blocks=num_blocks,
            size_bytes=size_bytes,
        )
        for (page_bytes, num_blocks, size_bytes), group in planes.items()
    )


def _spec_of(kv_cache_config: Any, layer: str) -> Any:
    group = next(group for group in kv_cache_config.kv_cache_groups if layer in group.layer_names)
    per_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return group.kv_cache_spec if per_layer is None else per_layer[layer]


SEAM = Seam(
    name="kv_memory",
    tier=Tier.KNOB,
    why="switching needs the KV cache at a stable address whose memory can be taken away",
    how="the worker class (worker_cls) answers _maybe_get_memory_pool_context('kv_cache') with a "
    "torch function mode that serves the allocation from the arena, and prefers layouts whose "
    "outermost dimension is the block in get_supported_kv_cache_layouts",
    upstream_link="https://github.com/vllm-project/vllm/issues/34303",
    remove_when="vLLM offers an allocator hook for KV tensors",
    relies_on=(
        Upstream("vllm.v1.worker.gpu_worker", "Worker._maybe_get_memory_pool_context", ("tag",)),
        Upstream(
            "vllm.v1.worker.utils", "allocate_kv_cache", ("kv_cache_config", "device", "layout")
        ),
        Upstream("vllm.v1.worker.worker_base", "WorkerBase.get_supported_kv_cache_layouts"),
        Upstream("vllm.v1.kv_cache_layout", "KVCacheLayout.is_block_outermost"),
        Upstream("vllm.v1.kv_cache_layout", "KVCacheLayout.BLHNC"),
        Upstream("vllm.v1.kv_cache_interface", "KVCacheTensor.block_stride"),
        Upstream("vllm.v1.kv_cache_interface", "KVCacheTensor.layer_stride"),
        Upstream("vllm.v1.kv_cache_interface", "KVCacheConfig.num_blocks_of"),
    ),
)
