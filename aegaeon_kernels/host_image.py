"""HostImage: a device image in host memory, ready to be copied as it is.

It knows bytes, checksums, files and who else has it open, not tensors or models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Self

from aegaeon_kernels import _C
from aegaeon_kernels._dlpack import as_torch
from aegaeon_kernels._image_json import Metadata, check_json, decode_metadata, encode_metadata
from aegaeon_kernels.arena import Device
from aegaeon_kernels.errors import IntegrityError, LifecycleError
from aegaeon_kernels.host_memory import HostPool, positive_threads

if TYPE_CHECKING:
    import torch

OnProgress = Callable[[int, int], object]  # (bytes done, bytes in total)


class HostImage(_C.HostImage):
    """Bytes in host memory in device layout; page-locked for a CUDA device.

    Made by allocate(); by open() from a file; by open_shared() from another process. Supports the
    buffer protocol: memoryview(image), numpy.frombuffer(image). Writable until seal(), read-only
    for buffers taken after it.

    Its name says in messages what the bytes are. A shared image may be published under that name,
    or another: published names are unique in their directory, and are what open_shared() asks for.
    """

    _shared: _C.SharedImage | None = None

    @classmethod
    def allocate(
        cls,
        size_bytes: int,
        *,
        device: Device | None = None,
        name: str | None = None,
        pool: HostPool | None = None,
        shared: bool = False,
        directory: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Memory for size_bytes bytes, zero at first.

        device: whose transfers it is for; a CUDA device page-locks it. None: the pool's, else the
                host device.
        name:   for messages: what the bytes are.
        pool:   where to take it from, so that nothing is page-locked now. None: from the driver,
                with pages that come as they are touched on the host device.
        shared: so that it can be published: memory of a file without a name, with its pages there.
                If the driver cannot lock them it stays unlocked (pinned, pin_error).
        directory: of the file; see publish().
        Raises ValueError, DriverError, OutOfMemory (that of a full pool says who holds the space)
        and, when shared, OSError.
        """
        if size_bytes <= 0:
            raise ValueError(f"size_bytes={size_bytes} has to be positive")
        name = name or "unnamed"
        if shared:
            if pool is not None:
                raise ValueError("memory of a pool cannot be shared: leave out pool= or shared=")
            return cls._over(
                _C.SharedImage(
                    (device or Device("host"))._driver,
                    directory=_directory(directory),
                    size_bytes=size_bytes,
                    num_threads=positive_threads(None),
                ),
                name,
            )
        if directory is not None:
            raise ValueError("directory= is for a shared image")
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
        with closing(_C.ImageFile(os.fsencode(path))) as file:
            _check_footer(file.footer, os.fspath(path))
            name = name or os.fsencode(Path(path).name).decode(errors="backslashreplace")
            image = cls.allocate(file.size_bytes, device=device, name=name, pool=pool)
            try:
                file.read_into(
                    image,
                    verify=verify,
                    num_threads=positive_threads(num_threads),
                    on_progress=_with_total(on_progress, file.size_bytes),
                )
            except BaseException:
                # Its memory is not to live as long as the traceback.
                image = None  # type: ignore[assignment]
                raise
            return image

    @classmethod
    def open_shared(
        cls,
        name: str,
        *,
        device: Device | None = None,
        directory: str | os.PathLike[str] | None = None,
        verify: bool = True,
    ) -> Self:
        """The image that some process of this user has published: the same memory, read-only.

        The memory stays, and the name too unless its publisher takes it away, while this image or
        a view of it exists; and no longer than this process, however that ends. A child of fork()
        without exec shares the lease.

        device:  whose transfers it is for; a CUDA device locks the pages, which are there already.
        verify:  compare all chunks with their checksums now.
        Raises ValueError for what cannot be a name, FileNotFoundError and other OSErrors,
        IntegrityError, OutOfMemory.
        """
        shared = _C.SharedImage(
            (device or Device("host"))._driver, directory=_directory(directory), name=name
        )
        try:
            _check_footer(shared.footer, f"shared image {name!r}")
            image = cls._over(shared, name)
            if verify:
                # Not by a method of ours, whose frame would keep the image as long as a traceback.
                _C.HostImage.verify(image, num_threads=positive_threads(None))
        except BaseException:
            image = shared = None  # type: ignore[assignment]  # the lease ends before the traceback
            raise
        return image

    @classmethod
    def _over(cls, shared: _C.SharedImage, name: str) -> Self:
        image = cls(shared, name=name)
        image._shared = shared
        return image

    def publish(self, name: str | None = None) -> None:
        """Let other processes of this user open the sealed image by a name; at once and whole.

        name: None: the image's own. 1 to 200 of A-Z a-z 0-9 . _ -, the first not a dot or dash.

        The file appears, readable by this user only (0600), in the directory that allocate() was
        given; by default /dev/shm/aegaeon-<user id> (0700). Nobody can write to the bytes from now
        on, this process neither: a view taken before the seal ends in a segmentation fault. The
        name is there until unpublish(), or this image is gone. If this process is killed it
        outlives it for as long as anybody has the image open; then it is garbage, which
        collect_garbage() removes, and the next who publishes under that name.

        Raises ValueError for a bad name or an image that was not allocated shared; LifecycleError
        unless it is sealed, if it was published before, or if a living image has the name: of two
        who publish at once, one is told so; OSError.
        """
        if self._shared is None:
            raise ValueError(f"{self!r} cannot be published: allocate it with shared=True")
        self._shared.publish(self, name=name or self.name)

    def unpublish(self) -> None:
        """Take the name away: nobody can open it from now on.

        Whoever has it open keeps it: the memory comes free when the last of them ends. It cannot be
        published again. Raises LifecycleError unless this image is published.
        """
        if self._shared is None:
            raise LifecycleError(f"{self!r} is not published")
        self._shared.unpublish()

    @property
    def published_name(self) -> str | None:
        """The name under which this process has published it; None: it has not, or no longer."""
        return (self._shared and self._shared.published_name) or None

    @property
    def leased(self) -> bool:
        """Whether anybody else, in this or another process, has the shared image open."""
        return self._shared is not None and self._shared.leased

    @property
    def pin_error(self) -> str | None:
        """Why the driver could not lock the pages of a shared image; None: it has."""
        return (self._shared and self._shared.pin_error) or None

    @staticmethod
    def published(directory: str | os.PathLike[str] | None = None) -> list[str]:
        """The names in a directory, garbage too."""
        return _C.shared_image_names(directory=_directory(directory))

    @staticmethod
    def collect_garbage(directory: str | os.PathLike[str] | None = None) -> list[str]:
        """Remove the names in a directory whose images nobody has open, and return them."""
        return _C.collect_shared_images(directory=_directory(directory))

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


def _directory(directory: str | os.PathLike[str] | None) -> bytes:
    return os.fsencode(f"/dev/shm/aegaeon-{os.geteuid()}" if directory is None else directory)


def _check_footer(footer: _C._Footer, what: str) -> None:
    _, _, metadata, layout = footer
    try:
        decode_metadata(metadata)
        check_json(layout)
    except ValueError as error:
        raise IntegrityError(f"{what}: {error}") from None


def _with_total(on_progress: OnProgress | None, total: int) -> Callable[[int], object] | None:
    if on_progress is None:
        return None
    return lambda num_bytes: on_progress(num_bytes, total)
