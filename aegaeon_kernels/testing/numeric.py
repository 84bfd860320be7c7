"""Bitwise comparison of arrays and tensors.

Copies must not change a bit, and NaNs compare equal to nothing: contents are compared as bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def assert_bitwise_equal(actual: Any, expected: Any, *, what: str = "") -> None:
    """Raise AssertionError that names the first differing byte, its element and both values.

    actual, expected: torch tensors (any device), numpy arrays, or objects with the buffer protocol,
    of the same shape and item size.
    """
    found, wanted = _as_array(actual), _as_array(expected)
    prefix = f"{what}: " if what else ""
    if found.shape != wanted.shape or found.itemsize != wanted.itemsize:
        raise AssertionError(
            f"{prefix}{found.shape} of {found.itemsize}-byte items against "
            f"{wanted.shape} of {wanted.itemsize}-byte items"
        )
    different = _as_bytes(found) != _as_bytes(wanted)
    if not different.any():
        return
    byte_idx = int(different.argmax())
    item_idx = byte_idx // found.itemsize
    byte, expected_byte = _as_bytes(found)[byte_idx], _as_bytes(wanted)[byte_idx]
    coordinate = tuple(int(i) for i in np.unravel_index(item_idx, found.shape or (1,)))
    raise AssertionError(
        f"{prefix}{int(different.sum())} of {different.size} bytes differ; the first is byte "
        f"{byte_idx}: {byte:#04x}, expected {expected_byte:#04x} "
        f"(element {coordinate}: {found.flat[item_idx]}, expected {wanted.flat[item_idx]})"
    )


def _as_array(value: Any) -> npt.NDArray[Any]:
    if hasattr(value, "detach"):  # a torch tensor, told apart without importing torch
        import torch

        tensor = value.detach().cpu().contiguous()
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        try:
            return np.asarray(tensor.numpy())
        except TypeError:  # bfloat16 and 8-bit floats have no numpy type
            return np.asarray(tensor.view(integer[tensor.element_size()]).numpy())
    if isinstance(value, (bytes, bytearray, memoryview)):
        return np.frombuffer(value, np.uint8)
    return np.asarray(value)


def _as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
