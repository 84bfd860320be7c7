"""How memory becomes a torch tensor: by DLPack, so that nothing here links to torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# DLPack's type codes (dlpack.h, DLDataTypeCode).
_CODE_OF = {
    "int8": 0,
    "int16": 0,
    "int32": 0,
    "int64": 0,
    "uint8": 1,
    "uint16": 1,
    "uint32": 1,
    "uint64": 1,
    "float16": 2,
    "float32": 2,
    "float64": 2,
    "bfloat16": 4,
    "complex64": 5,
    "complex128": 5,
    "bool": 6,
}


class Export(Protocol):
    """Makes a capsule of the bytes from an offset on."""

    def __call__(
        self, offset_bytes: int, shape: Sequence[int], code: int, bits: int, versioned: bool
    ) -> object: ...


def require_fit(
    size_bytes: int, offset_bytes: int, shape: Sequence[int], item_bytes: int, dtype: str
) -> int:
    """The bytes of an array at an offset in size_bytes. Raises ValueError when it does not fit."""
    if offset_bytes < 0 or offset_bytes % item_bytes:
        raise ValueError(
            f"offset_bytes={offset_bytes} has to be a multiple of {item_bytes}, "
            f"the item size of {dtype}"
        )
    array_bytes = math.prod(shape) * item_bytes
    if min(shape, default=1) <= 0 or offset_bytes + array_bytes > size_bytes:
        raise ValueError(
            f"shape {tuple(shape)} of {dtype} at offset {offset_bytes} is empty, or does not fit "
            f"in {size_bytes} bytes"
        )
    return array_bytes


def as_torch(
    export: Export, size_bytes: int, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor at an offset in size_bytes of memory. Raises ValueError when it does not fit."""
    require_fit(size_bytes, offset_bytes, shape, dtype.itemsize, str(dtype))
    from torch.utils.dlpack import from_dlpack

    name = str(dtype).removeprefix("torch.")
    if name in _CODE_OF:
        capsule = export(offset_bytes, shape, _CODE_OF[name], 8 * dtype.itemsize, False)
        return from_dlpack(capsule)
    # 8-bit floats and the like have no code that every torch accepts: bytes, seen as the type.
    last = [*shape[:-1], shape[-1] * dtype.itemsize] if shape else [dtype.itemsize]
    tensor = from_dlpack(export(offset_bytes, last, 1, 8, False)).view(dtype)
    return tensor.reshape(tuple(shape))


def wants_versioned(wanted: Mapping[str, Any]) -> bool:
    """Whether the consumer's __dlpack__ arguments allow the structures of DLPack 1.0."""
    version = wanted.get("max_version")
    return version is not None and version[0] >= 1
