"""What a stream is called by the library it comes from, as the number the driver knows it by."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["StreamLike", "stream_handle"]


@runtime_checkable
class CudaStreamProtocol(Protocol):
    """As defined by cuda.core: https://nvidia.github.io/cuda-python/cuda-core/latest/interoperability.html"""

    def __cuda_stream__(self) -> tuple[int, int]: ...


@runtime_checkable
class TorchStream(Protocol):
    @property
    def cuda_stream(self) -> int: ...


@runtime_checkable
class CupyStream(Protocol):
    @property
    def ptr(self) -> int: ...


StreamLike = int | CudaStreamProtocol | TorchStream | CupyStream


def stream_handle(stream: StreamLike) -> int:
    """The handle of a stream of torch, of CuPy, of what speaks the protocol, or the number itself.

    Raises ValueError for anything else.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if isinstance(stream, CudaStreamProtocol):
        _version, handle = stream.__cuda_stream__()
        return handle
    if isinstance(stream, TorchStream):
        return stream.cuda_stream
    if isinstance(stream, CupyStream):
        return stream.ptr
    raise ValueError(f"{stream!r} is not a stream: give one of torch or CuPy, or its handle")
