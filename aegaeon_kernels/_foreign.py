"""Memory that belongs to another library's object: where it is, and that it stays meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np

from aegaeon_kernels import _C
from aegaeon_kernels._closing import ClosedOnExit

# DLPack's device types (dlpack.h, DLDeviceType): memory that the host can read.
_HOST_TYPES = {1, 3}  # kDLCPU, kDLCUDAHost


class ForeignMemory(ClosedOnExit):
    """The bytes of an object with the buffer protocol, or with __dlpack__ on the host or `driver`.

    stream: a tensor's device makes what it has been given to do visible there. A context manager:
    the object's memory stays until the block is left. Raises ValueError.
    """

    def __init__(self, owner: Any, driver: _C.Driver, stream: int) -> None:
        self._keep: object
        kind = type(owner).__name__
        try:
            array = np.frombuffer(owner, np.uint8)
        except (TypeError, BufferError):  # no buffer; or, of numpy's, one with gaps
            array = None
        if array is not None:
            self.address, self.size_bytes = array.ctypes.data, array.nbytes
            self.on_device, self.read_only = False, not array.flags.writeable
            self._keep = array
        elif hasattr(owner, "__dlpack__"):
            where = tuple(owner.__dlpack_device__())
            self.on_device = where[0] not in _HOST_TYPES
            if self.on_device and where != driver.dlpack_device:
                raise ValueError(
                    f"a {kind} on DLPack's device {where} is neither on the host nor on "
                    f"{driver.name}"
                )
            tensor = _C.DLPackImport(_capsule(owner, stream if self.on_device else None))
            if not tensor.contiguous:
                raise ValueError(f"a {kind} has to be C-contiguous to be copied")
            self.address, self.size_bytes = tensor.address, tensor.size_bytes
            self.read_only = tensor.read_only
            self._keep = tensor
        else:
            raise ValueError(f"a {kind} has neither a contiguous buffer nor __dlpack__")

    def close(self) -> None:
        """Let the object go."""
        self._keep = None


def _capsule(owner: Any, stream: int | None) -> Any:
    arguments = {} if stream is None else {"stream": stream}
    try:
        return owner.__dlpack__(max_version=(1, 0), **arguments)
    except TypeError:  # of before DLPack 1.0, which does not tell read-only memory
        return owner.__dlpack__(**arguments)
