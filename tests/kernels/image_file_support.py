"""Images that are saved, and what is said of their files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from kernel_support import MIB, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice

CHUNK = _C.IMAGE_CHUNK_BYTES
PAGE = 4096
TAIL = 64


def make_image(size: int, seed: int = 1, **options: object) -> ak.HostImage:
    image = ak.HostImage.allocate(size, **options)  # type: ignore[arg-type]
    np.frombuffer(image, np.uint8)[:] = pattern(size, seed)
    return image


def sealed_image(size: int, seed: int = 1) -> ak.HostImage:
    image = make_image(size, seed)
    image.metadata = {"model": "qwen", "rank": 3}
    image.layout_json = b'{"tensors": []}'
    image.seal()
    return image


def saved(folder: Path, size: int, seed: int = 1) -> Path:
    path = folder / f"{size}.image"
    sealed_image(size, seed).save(path)
    return path


def listed(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@contextmanager
def nothing_left() -> Iterator[None]:
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


def refused(path: Path, data: bytes, message: str | None = None) -> None:
    path.write_bytes(data)
    device = FaultyDevice(ak.Device("host", memory_bytes=MIB))
    with nothing_left(), pytest.raises(ak.IntegrityError, match=message) as caught:
        ak.HostImage.open(path, device=device)
    assert str(path) in str(caught.value)
    caught = None  # type: ignore[assignment]  # its frames hold the image
    assert device.live == {}
