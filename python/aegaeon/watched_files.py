"""Files that are read again when they change, however they are changed."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from watchfiles import awatch

logger = logging.getLogger(__name__)

_LOOK_EVERY_MS = 5000


async def watch_files(files: Mapping[Path, Callable[[], None]]) -> None:
    """Call a file's function, on the event loop, each time its bytes have changed. Never returns.

    Each is called once at the beginning too: a file may have changed since it was read. What a
    function raises is logged, and the watch goes on.

    Folders are watched, not files: editors and secret mounts put a new file in the old one's place.
    """
    if not files:
        await asyncio.Event().wait()
    seen: dict[Path, bytes | None] = {}
    _call_changed(files, seen)
    folders = {path.parent for path in files}
    # Looked at without an event too: one may have changed while the watch was being set up.
    async for _ in awatch(
        *folders,
        recursive=False,
        step=50,
        debounce=200,
        rust_timeout=_LOOK_EVERY_MS,
        yield_on_timeout=True,
    ):
        _call_changed(files, seen)


def _call_changed(files: Mapping[Path, Callable[[], None]], seen: dict[Path, bytes | None]) -> None:
    for path, changed in files.items():
        now = _digest(path)
        # One that is gone for a moment is being replaced; what it said goes on.
        if now is None or now == seen.get(path):
            continue
        seen[path] = now
        try:
            changed()
        except Exception:
            logger.exception("%s has changed and could not be taken on", path.name)


def _digest(path: Path) -> bytes | None:
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).digest()
    return None
