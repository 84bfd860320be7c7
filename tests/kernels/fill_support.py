"""Checkpoints to fill images from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from kernel_support import pattern
from safetensors.torch import load_file, save_file

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import assert_bitwise_equal

CHUNK = _C.IMAGE_CHUNK_BYTES

TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.int64, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz),
    *(torch.float8_e5m2fnuz, torch.complex64, torch.float4_e2m1fn_x2),
]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    data = torch.from_numpy(pattern(size, seed))
    if dtype is torch.bool:
        data %= 2
    return data.view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def assert_holds(image: ak.HostImage, tensors: dict[str, torch.Tensor]) -> None:
    """The image has each tensor bitwise, zeros between them, and says so in its layout."""
    layout = ak.ImageLayout.from_json(image.layout_json)
    covered = np.zeros(image.size_bytes, bool)
    for name, expected in tensors.items():
        found = layout.tensor(image, name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert_bitwise_equal(bytes_of(found), bytes_of(expected))
        placed = layout.tensors[name]
        covered[placed.offset_bytes : placed.end_bytes] = True
    assert not np.frombuffer(image, np.uint8)[~covered].any()
    assert image.sealed
    image.verify()


def load_files(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, num_shards: int) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        names = list(tensors)[shard::num_shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
