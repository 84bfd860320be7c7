"""A pool file that is edited while its pool is served."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aegaeon.core.changes import changes, taken_on
from aegaeon.core.config import PoolConfig
from aegaeon.core.errors import AegaeonError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolSource:
    """Where a pool comes from. read: as at the start, with what the command line overrides."""

    path: Path
    read: Callable[[], PoolConfig]


class PoolReload:
    """Takes on what has changed in the file, and says what; else the last good one stays.

    pool: what is served now. apply: has the parts of the server act on a pool that differs from it
    in live keys only; it may raise AegaeonError and TimeoutError, and is then asked again with the
    next change.
    """

    def __init__(
        self,
        source: PoolSource,
        pool: PoolConfig,
        apply: Callable[[PoolConfig, PoolConfig], Awaitable[None]],
    ) -> None:
        self._source = source
        self._pool = pool
        self._apply = apply
        self._one_at_a_time = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()

    def changed(self) -> None:
        """The file has changed; returns before that is dealt with. On the event loop."""
        task = asyncio.ensure_future(self.reload())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def reload(self) -> None:
        """Read the file and act on it; logs the difference, raises nothing."""
        async with self._one_at_a_time:
            name = self._source.path.name
            try:
                new = await asyncio.to_thread(self._source.read)
            except (ConfigError, OSError) as error:
                logger.error("%s cannot be used, all stays as it was: %s", name, error)
                return
            found = changes(self._pool, new)
            effective = taken_on(self._pool, new)
            try:
                await self._apply(self._pool, effective)
            except (AegaeonError, TimeoutError) as error:
                logger.error("%s could not be taken on: %s", name, error)
                return
            self._pool = effective
            for change in found:
                if change.live:
                    logger.info("%s: %s", name, change)
                else:
                    logger.warning("%s: %s: needs a restart of the server", name, change)
            if not found:
                logger.info("%s: nothing that matters has changed", name)
