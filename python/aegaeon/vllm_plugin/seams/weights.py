"""A loaded model's weights move into one region of the arena.

vLLM loads and post-processes the model as always, in ordinary memory. Then every storage that the
module tree reaches gets a place in one range; the host image is filled from them, and the tensors
are rebound to the range. Parameters keep their identity, tied tensors stay tied, views stay views.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.layers.base import BaseLayerWithLoRA

import aegaeon_kernels as ak
from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream

# What device copies and vectorised loads like best; also more than any dtype needs.
TENSOR_ALIGNMENT_BYTES = 256


@dataclass(frozen=True)
class WeightPlacement:
    """Where each storage goes: data pointer -> offset in the range of `size_bytes`."""

    offsets: dict[int, int]
    size_bytes: int


def module_tensors(root: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that the module tree holds: parameters, buffers, plain attributes.

    Also looks into lists, tuples and dictionaries of tensors. KV caches, which the attention
    layers hold too, are not weights and are left out; and so are the slots of LoRA adapters, which
    are written to whenever an adapter comes or goes, where the host image of weights never changes.
    """
    seen: set[int] = set()
    for module in root.modules():
        if isinstance(module, BaseLayerWithLoRA):
            continue  # of its own it has the slots; the layer that it adapts is a module below
        values = [*module._parameters.values(), *module._buffers.values()]
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules", "kv_cache"):
                continue
            values.extend(_tensors_in(value))
        for tensor in values:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (item for item in value if isinstance(item, torch.Tensor))
    elif isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, torch.Tensor))


def place(root: torch.nn.Module, device: torch.device) -> WeightPlacement:
    """Give every storage on `device` an offset, in the order of the modules."""
    offsets: dict[int, int] = {}
    end = 0
    for tensor in _movable(root, device):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in offsets:
            start = -(-end // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES
            offsets[storage.data_ptr()] = start
            end = start + storage.nbytes()
    return WeightPlacement(offsets=offsets, size_bytes=end)


def layout_json(root: torch.nn.Module, placement: WeightPlacement) -> bytes:
    """What lies where, in the order of the modules: an image fits a model if theirs are equal."""
    device = _device_of(root)
    tensors = [
        [
            str(tensor.dtype),
            list(tensor.shape),
            list(tensor.stride()),
            tensor.storage_offset(),
            placement.offsets[tensor.untyped_storage().data_ptr()],
        ]
        for tensor in _movable(root, device)
    ]
    return json.dumps({"size_bytes": placement.size_bytes, "tensors": tensors}).encode()


def fill_image(root: torch.nn.Module, placement: WeightPlacement, image: ak.HostImage) -> None:
    """Copy the storages into `image`, in the layout of the device, and seal it."""
    image.layout_json = layout_json(root, placement)
    target = image.tensor()
    done: set[int] = set()
    for tensor in _movable(root, _device_of(root)):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in done:
            continue
        done.add(storage.data_ptr())
        offset = placement.offsets[storage.data_ptr()]
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        target[offset : offset + storage.nbytes()].copy_(source)
    image.seal()


@torch.no_grad()
def rebind(root: torch.nn.Module, placement: WeightPlacement, region: ak.Region) -> int:
    """Point every tensor at its place in `region`, whose bytes must be there already.

    Returns the number of tensors. The ordinary memory is freed when nothing else refers to it.
    """
    device = _device_of(root)
    moved = 0
    bases: dict[int, torch.Tensor] = {}
    for tensor in list(_movable(root, device)):
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in bases:
            bases[key] = region.tensor(
                (storage.nbytes(),), torch.uint8, offset_bytes=placement.offsets[key]
            )
        base = bases[key].untyped_storage()
        skip = bases[key].storage_offset() // tensor.element_size()
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            base, skip + tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        moved += 1
    return moved


def _movable(root: torch.nn.Module, device: torch.device) -> Iterator[torch.Tensor]:
    for tensor in module_tensors(root):
        if tensor.device.type == device.type and tensor.untyped_storage().nbytes() > 0:
            yield tensor


def _device_of(root: torch.nn.Module) -> torch.device:
    return next(root.parameters()).device


SEAM = Seam(
    name="weights",
    tier=Tier.KNOB,
    why="weights must lie in one range that can be evicted and restored by a few large copies",
    how="the worker class (worker_cls) rebinds the tensors of the module tree after load_model",
    upstream_link="https://github.com/vllm-project/vllm/issues/34303",
    remove_when="vLLM's memory pool hook serves several models of one process",
    relies_on=(
        Upstream("vllm.v1.worker.gpu_worker", "Worker.load_model", ("load_dummy_weights",)),
        Upstream("vllm.lora.layers.base", "BaseLayerWithLoRA"),
        Upstream("vllm.v1.worker.cpu_worker", "CPUWorker"),
        Upstream("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.get_model"),
    ),
)
