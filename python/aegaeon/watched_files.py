"""Files that are read again when they change, however they are changed."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from watchfiles import awatch

logger = logging.getLogger(__name__)


async def watch_files(files: Mapping[Path, Callable[[], None]]) -> None:
    """Call a file's function, on the event loop, each time its bytes have changed. Never returns.

    Folders are watched, not files: editors and secret mounts put a new file in the old one's place.
    """
    if not files:
        await asyncio.Event().wait()
    seen = {path: _digest(path) for path in files}
    folders = {path.parent for path in files}
    async for _ in awatch(*folders, recursive=False, step=50, debounce=200):
        for path, changed in files.items():
            now = _digest(path)
            # One that is gone for a moment is being replaced; what it said goes on.
            if now is not None and now != seen[path]:
                seen[path] = now
                changed()


def _digest(path: Path) -> bytes | None:
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).digest()
    return None
