"""The vLLM worker whose model lives in an arena: weights and KV in stable, evictable regions.

Given to vLLM as `worker_cls`. A worker is built inside `hosting(...)`, which says into whose arena
and under which name; outside of it there is nowhere to put the model, and it says so.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.worker.gpu_worker import Worker

import aegaeon_kernels as ak
from aegaeon.core.errors import ModelLoadError
from aegaeon.switching.residency import KVUnit
from aegaeon.vllm_plugin.hosting import current_hosting
from aegaeon.vllm_plugin.image_key import image_key
from aegaeon.vllm_plugin.seams import (
    expert_group,
    image_loader,
    kv_blocks,
    kv_memory,
    kv_zeroing,
    rotary_cache,
    weights,
)


class ArenaWorker(Worker):
    """On CUDA as it is; `cpu_worker.ArenaCPUWorker` builds the same on vLLM's CPU worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        place = current_hosting()
        super().__init__(*args, **kwargs)
        self._switcher, self._name, self._image_cache = place
        self._kv: KVUnit | None = None
        self._kv_bytes: torch.Tensor | None = None
        self._kv_generation = -1

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        rotary_cache.forget_shared_rotary_modules()
        expert_group.ensure_expert_group(self.model_config)
        device = self._switcher.arena.device
        cache, key = self._image_cache, None
        if cache is not None:
            key = image_key(self.vllm_config, device_kind=device.kind)
        image = cache.open(self._name, key, device=device) if cache and key else None
        with nullcontext() if image is None else self._without_weights():
            super().load_model(load_dummy_weights=load_dummy_weights)
        model = self.model_runner.get_model()
        placement = weights.place(model, self.device)
        if image is None:
            image = ak.HostImage.allocate(
                placement.size_bytes, device=device, name=f"{self._name} weights"
            )
            weights.fill_image(model, placement, image)
            if cache and key:
                cache.save(self._name, key, image)
        elif image.layout_json != weights.layout_json(model, placement):
            if cache and key:
                cache.remove(self._name, key)
            raise ModelLoadError(
                self._name,
                "its cached image has another layout than vLLM gave it now; the image has been "
                "removed, the next start loads the checkpoint",
            )
        unit = self._switcher.add_weights(self._name, image)
        self._switcher.activate(self._name)
        weights.rebind(model, placement, unit.region)

    def _without_weights(self) -> AbstractContextManager[None]:
        return image_loader.weights_left_out(self.vllm_config.load_config)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag == "kv_cache":
            return kv_memory.KVAllocation(self._allocate_kv)
        # Weights are loaded into ordinary memory and rebound; workspaces are not evicted yet.
        return nullcontext()

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return kv_memory.block_outermost_first(super().get_supported_kv_cache_layouts())

    def _allocate_kv(self, size_bytes: int) -> torch.Tensor:
        self._kv = self._switcher.add_kv(self._name, size_bytes)
        self._switcher.activate(self._name)
        self._kv_bytes = self._kv.region.tensor((size_bytes,), torch.int8)
        return self._kv_bytes.zero_()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        if self._kv is not None:
            self._kv.layouts = kv_memory.layouts_of(kv_cache_config)

    def renumber_blocks(self, new_ids: npt.NDArray[np.int32]) -> None:
        """Between two steps: block i is called new_ids[i] from now on."""
        kv_blocks.renumber_tables(self.model_runner, new_ids)

    def execute_model(self, scheduler_output: Any) -> Any:
        # A step without tokens only reports finished requests, and the model may be away.
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens and self._kv is not None and self._kv_bytes is not None:
            if self._kv_generation != self._kv.region.generation:
                kv_zeroing.zero_null_block(self._kv_bytes, self._kv.layouts)
                self._kv_generation = self._kv.region.generation
            kv_zeroing.zero_new_blocks(scheduler_output, self._kv_bytes, self._kv.layouts)
        return super().execute_model(scheduler_output)
