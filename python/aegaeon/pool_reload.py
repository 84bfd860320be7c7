"""A pool file that is edited while its pool is served."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aegaeon.core.changes import Change, changes, taken_on
from aegaeon.core.config import ModelConfig, PoolConfig
from aegaeon.core.errors import AegaeonError, ConfigError, UnknownModel
from aegaeon.server.admin import Models

logger = logging.getLogger(__name__)

RETRY_S = 5.0


@dataclass(frozen=True)
class PoolSource:
    """Where a pool comes from. read: as at the start, with what the command line overrides."""

    path: Path
    read: Callable[[], PoolConfig]


class PoolReload:
    """Takes on what has changed in the file, and says what; else the last good one stays.

    pool: what is served now. apply: has the parts of the server act on a pool that differs from it
    in live keys only; it may raise AegaeonError and TimeoutError, and is then asked again after
    RETRY_S. models: where models come and go.
    """

    def __init__(
        self,
        source: PoolSource,
        pool: PoolConfig,
        apply: Callable[[PoolConfig, PoolConfig], Awaitable[None]],
        models: Models,
    ) -> None:
        self._source = source
        self._pool = pool
        self._apply = apply
        self._models = models
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
            try:
                new = await asyncio.to_thread(self._source.read)
            except (ConfigError, OSError) as error:
                logger.error("%s cannot be used, all stays as it was: %s", self._name, error)
                return
            found = changes(self._pool, new)
            await self._let_go(new)
            await self._take_on(new, [change for change in found if not change.is_a_model])
            await self._take_in(new)
            if not found:
                logger.info("%s: nothing that matters has changed", self._name)

    @property
    def _name(self) -> str:
        return self._source.path.name

    async def _take_on(self, new: PoolConfig, found: Sequence[Change]) -> None:
        effective = taken_on(self._pool, new)
        try:
            await self._apply(self._pool, effective)
        except (AegaeonError, TimeoutError) as error:
            reason = str(error) or "the instance does not answer"
            logger.error("%s could not be taken on, yet: %s", self._name, reason)
            asyncio.get_running_loop().call_later(RETRY_S, self.changed)
            return
        self._pool = effective
        for change in found:
            if change.live:
                logger.info("%s: %s", self._name, change)
            else:
                logger.warning("%s: %s: needs a restart of the server", self._name, change)

    async def _let_go(self, new: PoolConfig) -> None:
        stay = {model.name for model in new.models}
        for model in self._pool.models:
            if model.name in stay:
                continue
            try:
                with suppress(UnknownModel):  # removed by order before
                    await self._models.remove(model.name, timeout_s=new.server.drain_timeout)
            except (AegaeonError, TimeoutError) as error:
                logger.error("%s: %s is not removed: %s", self._name, model.name, error)
                continue
            self._serve(tuple(each for each in self._pool.models if each is not model))
            logger.info("%s: models[%s]: removed", self._name, model.name)

    async def _take_in(self, new: PoolConfig) -> None:
        served = {model.name for model in self._pool.models}
        for model in new.models:
            if model.name in served:
                continue
            try:
                await self._models.add(model.model_dump(mode="json"))
            except (AegaeonError, TimeoutError) as error:
                logger.error("%s: %s is not added: %s", self._name, model.name, error)
                continue
            self._serve((*self._pool.models, model))
            logger.info("%s: models[%s]: added", self._name, model.name)

    def _serve(self, models: tuple[ModelConfig, ...]) -> None:
        self._pool = self._pool.model_copy(update={"models": models})
