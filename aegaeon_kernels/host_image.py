"""HostImage: a device image in host memory, ready to be copied as it is.

It knows bytes and checksums, not tensors or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from aegaeon_kernels import _C
from aegaeon_kernels._dlpack import as_torch
from aegaeon_kernels.arena import Device

if TYPE_CHECKING:
    import torch


class HostImage(_C.HostImage):
    """Bytes in host memory in device layout; page-locked for a CUDA device, filled on first touch.

    Made by allocate(). Supports the buffer protocol: memoryview(image), numpy.frombuffer(image).
    Writable until seal(), read-only for buffers taken after it.
    """

    @classmethod
    def allocate(
        cls, size_bytes: int, *, device: Device | None = None, name: str | None = None
    ) -> Self:
        """Memory for size_bytes bytes, zero at first.

        device: whose transfers it is for; a CUDA device page-locks it. None: the host device.
        name:   for messages.
        Raises ValueError, OutOfMemory, DriverError.
        """
        if size_bytes <= 0:
            raise ValueError(f"size_bytes={size_bytes} has to be positive")
        device = device or Device("host")
        return cls(device._driver, size_bytes=size_bytes, name=name or "unnamed")

    def tensor(
        self,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        offset_bytes: int = 0,
    ) -> torch.Tensor:
        """A torch CPU tensor over the bytes, without a copy; by default all of them as uint8.

        The tensor keeps the image alive. Do not write through it once the image is sealed.
        Raises ValueError when it does not fit or is misaligned.
        """
        import torch

        dtype = dtype or torch.uint8
        if shape is None:
            shape = [max(self.size_bytes - offset_bytes, 0) // dtype.itemsize]
        return as_torch(self._export, self.size_bytes, offset_bytes, shape, dtype)

    def _export(
        self, offset_bytes: int, shape: Sequence[int], code: int, bits: int, versioned: bool
    ) -> object:
        return self.dlpack(
            offset_bytes=offset_bytes,
            shape=list(shape),
            type_code=code,
            type_bits=bits,
            versioned=versioned,
        )

    def __len__(self) -> int:
        return self.size_bytes

    def __repr__(self) -> str:
        state = "sealed" if self.sealed else "open"
        return f"HostImage({self.name!r}, size_bytes={self.size_bytes}, {state})"
