"""Weights images on disk, so that a restart reads them instead of loading checkpoints again.

One file per key, in the format of `aegaeon_kernels.HostImage.save`: checksummed, written beside its
name and renamed, so that several processes may share a directory. The directory holds at most
`max_bytes`; what has not been used for longest goes first.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import aegaeon_kernels as ak
from aegaeon.core.config import format_bytes

logger = logging.getLogger(__name__)

_SUFFIX = ".image"


@dataclass(frozen=True)
class ImageCache:
    """Nothing here raises for a disk that is full or gone: then the cache has less to give."""

    directory: Path
    max_bytes: int

    def open(self, name: str, key: str, *, device: ak.Device) -> ak.HostImage | None:
        """The image saved under that key, sealed and verified; None: there is none that is whole.

        name: for people, a part of the file's name. An altered or torn file is removed.
        """
        path = self._path(name, key)
        try:
            image = ak.HostImage.open(path, device=device, name=f"{name} weights")
            os.utime(path)
        except FileNotFoundError:
            return None
        except ak.IntegrityError as error:
            logger.warning(f"the cached image of {name!r} is damaged and is built again: {error}")
            self.remove(name, key)
            return None
        except OSError as error:
            logger.warning(f"the cached image of {name!r} cannot be read: {error}")
            return None
        return image

    def save(self, name: str, key: str, image: ak.HostImage) -> bool:
        """Keep a sealed image, in place of older ones if need be; whether it is kept."""
        if image.size_bytes > self.max_bytes:
            logger.warning(
                f"the image of {name!r} is not cached: it has {format_bytes(image.size_bytes)}, "
                f"image_cache.max_size is {format_bytes(self.max_bytes)}"
            )
            return False
        path = self._path(name, key)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(image.size_bytes, keep=path)
            image.save(path)
        except OSError as error:
            logger.warning(f"the image of {name!r} is not cached: {error}")
            return False
        return True

    def remove(self, name: str, key: str) -> None:
        """Forget the image of that key, if there is one."""
        try:
            self._path(name, key).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"the cached image of {name!r} cannot be removed: {error}")

    def _path(self, name: str, key: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:64]
        return self.directory / f"{readable}-{key}{_SUFFIX}"

    def _make_room(self, num_bytes: int, *, keep: Path) -> None:
        held = []
        for path in self.directory.glob(f"*{_SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process makes room too
                continue
            if path != keep:
                held.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total + num_bytes <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
