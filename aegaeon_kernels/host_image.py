"""HostImage: a device image in host memory, ready to be copied as it is.

It knows bytes, checksums and files, not tensors or models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from aegaeon_kernels import _C
from aegaeon_kernels._dlpack import as_torch
from aegaeon_kernels._image_json import Metadata, check_json, decode_metadata, encode_metadata
from aegaeon_kernels.arena import Device
from aegaeon_kernels.errors import IntegrityError
from aegaeon_kernels.host_memory import HostPool, positive_threads

if TYPE_CHECKING:
    import torch

OnProgress = Callable[[int, int], object]  # (bytes done, bytes in total)


class HostImage(_C.HostImage):
    """Bytes in host memory in device layout; page-locked for a CUDA device.

    Made by allocate(), or by open() from a file. Supports the buffer protocol: memoryview(image),
    numpy.frombuffer(image). Writable until seal(), read-only for buffers taken after it.
    """

    @classmethod
    def allocate(
        cls,
        size_bytes: int,
        *,
        device: Device | None = None,
        name: str | None = None,
        pool: HostPool | None = None,
    ) -> Self:
        """Memory for size_bytes bytes, zero at first.

        device: whose transfers it is for; a CUDA device page-locks it. None: the pool's, else the
                host device.
        name:   for messages: what the bytes are.
        pool:   where to take it from, so that nothing is page-locked now. None: from the driver,
                with pages that come as they are touched on the host device.
        Raises ValueError, DriverError, OutOfMemory; that of a full pool says who holds the space.
        """
        if size_bytes <= 0:
            raise ValueError(f"size_bytes={size_bytes} has to be positive")
        name = name or "unnamed"
        if pool is None:
            device = device or Device("host")
            return cls(device._driver, size_bytes=size_bytes, name=name)
        if device is not None and device._driver is not pool.device._driver:
            raise ValueError(f"the pool is for {pool.device!r}, not for {device!r}")
        return cls(pool._pool, size_bytes=size_bytes, name=name)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        device: Device | None = None,
        pool: HostPool | None = None,
        name: str | None = None,
        verify: bool = True,
        num_threads: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Self:
        """Read an image that save() wrote, into memory as allocate() gives it. It is sealed.

        name:        for messages; None: the file's.
        verify:      compare every chunk with its checksum while it is read (it costs little).
        num_threads: that read; None: as the machine has, up to 8.
        on_progress: called with (bytes read, bytes in total) now and then, on this thread; what it
                     raises ends the reading.
        Raises OSError, IntegrityError (not an image; torn, altered; the chunks that are bad), and
        what allocate() does. Then nothing is left of it.
        """
        file = _C.ImageFile(os.fsencode(path))
        _, _, metadata, layout = file.footer
        try:
            decode_metadata(metadata)
            check_json(layout)
        except ValueError as error:
            raise IntegrityError(f"{os.fspath(path)}: {error}") from None
        name = name or os.fsencode(Path(path).name).decode(errors="backslashreplace")
        image = cls.allocate(file.size_bytes, device=device, name=name, pool=pool)
        file.read_into(
            image,
            verify=verify,
            num_threads=positive_threads(num_threads),
            on_progress=_with_total(on_progress, file.size_bytes),
        )
        return image

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        num_threads: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Write the sealed image to a file for open(), in place of one of that name.

        The name shows the new file when all of it is on disk, and until then the old one, whatever
        happens. on_progress: as for open(). Raises LifecycleError unless sealed, OSError.
        """
        _C.save_image(
            self,
            path=os.fsencode(path),
            num_threads=positive_threads(num_threads),
            on_progress=_with_total(on_progress, self.size_bytes),
        )

    def seal(self, *, num_threads: int | None = None) -> None:
        """Fix the contents: a checksum (crc32c) per 8 MiB; no more stores, no other metadata.

        num_threads: that compute them; None: as the machine has, up to 8.
        Raises LifecycleError when it is sealed already, or a store into it is in flight.
        """
        super().seal(num_threads=positive_threads(num_threads))

    def verify(self, *, num_threads: int | None = None) -> None:
        """Raise IntegrityError, which names the chunks, if the bytes are not what was sealed.

        Raises LifecycleError unless it is sealed.
        """
        super().verify(num_threads=positive_threads(num_threads))

    @property
    def metadata(self) -> Metadata:
        """What those who choose among images want to know: str to str or int, at most 64 KiB.

        Goes into files with the contents; empty at first, set before the seal. Setting it raises
        ValueError for other types, LifecycleError after the seal.
        """
        return decode_metadata(self.get_metadata())

    @metadata.setter
    def metadata(self, metadata: Metadata) -> None:
        self.set_metadata(encode_metadata(metadata))

    @property
    def layout_json(self) -> bytes:
        """Where what is in it: JSON, at most 64 MiB, of which the image only knows that it is.

        Otherwise as metadata; empty at first.
        """
        return self.get_layout()

    @layout_json.setter
    def layout_json(self, layout: bytes) -> None:
        check_json(layout)
        self.set_layout(layout)

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


def _with_total(on_progress: OnProgress | None, total: int) -> Callable[[int], object] | None:
    if on_progress is None:
        return None
    return lambda num_bytes: on_progress(num_bytes, total)
