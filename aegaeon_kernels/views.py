"""Other libraries' arrays over memory of a region, and copies between the two.

This module knows torch, numpy, cupy and DLPack, not where the memory comes from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aegaeon_kernels import _C
from aegaeon_kernels._dlpack import as_torch, require_fit, wants_versioned
from aegaeon_kernels._foreign import ForeignMemory

if TYPE_CHECKING:
    import torch


class MemoryViews(ABC):
    """Arrays over a range of memory, without a copy. Each keeps the memory's owner alive.

    All are C-contiguous. They keep the address, not what is mapped there: after an unmap they may
    not be touched until the range is mapped again.
    """

    @property
    @abstractmethod
    def _native(self) -> _C.Region | _C.SharedRegion: ...

    @property
    @abstractmethod
    def _driver(self) -> _C.Driver: ...

    @property
    def address(self) -> int:
        return self._native.address

    @property
    def size_bytes(self) -> int:
        return self._native.size_bytes

    @property
    def closed(self) -> bool:
        return self._native.closed

    def mapped_ranges(self) -> list[tuple[int, int]]:
        """The mapped parts as (offset_bytes, size_bytes), neighbours joined, in order."""
        return self._native.mapped_ranges()

    def tensor(
        self, shape: Sequence[int], dtype: torch.dtype, offset_bytes: int = 0
    ) -> torch.Tensor:
        """A torch tensor over the range, on the region's device.

        offset_bytes: a multiple of the item size.
        Raises ValueError (outside the region, misaligned), LifecycleError (not mapped, closed).
        """
        return as_torch(self._export, self.size_bytes, offset_bytes, shape, dtype)

    def numpy(
        self, shape: Sequence[int], dtype: npt.DTypeLike, offset_bytes: int = 0
    ) -> npt.NDArray[Any]:
        """A numpy array over the range; of the host device only. Otherwise like tensor()."""
        if self._driver.kind != "host":
            raise ValueError(
                f"numpy cannot see the memory of {self._driver.name}: use cupy(), or copy_to()"
            )
        wanted = np.dtype(dtype)
        part: Any = self._bytes(shape, wanted, offset_bytes)
        array: npt.NDArray[Any] = np.from_dlpack(part).view(wanted)
        return array.reshape(tuple(shape))

    def cupy(self, shape: Sequence[int], dtype: npt.DTypeLike, offset_bytes: int = 0) -> Any:
        """A cupy array over the range; of a CUDA device only. Otherwise like tensor()."""
        if self._driver.kind != "cuda":
            raise ValueError(f"cupy cannot see the memory of {self._driver.name}: use numpy()")
        import cupy

        wanted = np.dtype(dtype)
        part = self._bytes(shape, wanted, offset_bytes)
        return cupy.from_dlpack(part).view(wanted).reshape(tuple(shape))

    def copy_from(self, source: Any, offset_bytes: int = 0) -> None:
        """Copy all of an object's bytes into the range, and wait until that is done.

        source: anything with the buffer protocol, or a tensor with __dlpack__ on the host or on
                the region's device; C-contiguous.
        Not ordered with other work on the region's memory. For what is small or rare: a Prefetcher
        moves images without holding the caller up. Raises ValueError (outside the region, not
        contiguous, on another device, overlapping), LifecycleError (not mapped, closed,
        read-only), DriverError (the range holds anything then), and what the object raises when
        it does not give its memory (BufferError for a tensor that requires a gradient).
        """
        stream = _C.Stream(self._driver)
        with ForeignMemory(source, self._driver, stream.id) as memory:
            self._require_fit(offset_bytes, memory.size_bytes)
            self._native.copy_in(
                stream=stream,
                offset_bytes=offset_bytes,
                address=memory.address,
                on_device=memory.on_device,
                size_bytes=memory.size_bytes,
            )

    def copy_to(self, target: Any, offset_bytes: int = 0) -> None:
        """Fill an object's bytes from the range, and wait until that is done; see copy_from()."""
        stream = _C.Stream(self._driver)
        with ForeignMemory(target, self._driver, stream.id) as memory:
            self._require_fit(offset_bytes, memory.size_bytes)
            if memory.read_only:
                raise ValueError(f"a {type(target).__name__} that is read-only cannot be filled")
            self._native.copy_out(
                stream=stream,
                offset_bytes=offset_bytes,
                address=memory.address,
                on_device=memory.on_device,
                size_bytes=memory.size_bytes,
            )

    def _require_fit(self, offset_bytes: int, size_bytes: int) -> None:
        require_fit(self.size_bytes, offset_bytes, [size_bytes], 1, "bytes")

    def _bytes(self, shape: Sequence[int], dtype: np.dtype[Any], offset_bytes: int) -> _Bytes:
        if dtype.hasobject:
            raise ValueError(f"{dtype} is Python objects, not bytes")
        return _Bytes(
            self,
            offset_bytes,
            require_fit(self.size_bytes, offset_bytes, shape, dtype.itemsize, str(dtype)),
        )

    def _export(
        self, offset_bytes: int, shape: Sequence[int], code: int, bits: int, versioned: bool
    ) -> object:
        return self._native.dlpack(
            offset_bytes=offset_bytes,
            shape=list(shape),
            type_code=code,
            type_bits=bits,
            versioned=versioned,
        )

    def __dlpack__(self, **wanted: Any) -> object:
        """The whole region as bytes, for numpy, cupy, torch and copy_from().

        Raises LifecycleError unless all of it is mapped.
        """
        return self._export(0, [self.size_bytes], 1, 8, wants_versioned(wanted))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._driver.dlpack_device


class _Bytes:
    """A part of a region, as what from_dlpack() of numpy and cupy takes."""

    def __init__(self, memory: MemoryViews, offset_bytes: int, size_bytes: int) -> None:
        self._memory = memory
        self._offset_bytes = offset_bytes
        self._size_bytes = size_bytes

    def __dlpack__(self, **wanted: Any) -> object:
        return self._memory._export(
            self._offset_bytes, [self._size_bytes], 1, 8, wants_versioned(wanted)
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._memory.__dlpack_device__()
