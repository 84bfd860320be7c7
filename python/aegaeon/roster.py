"""Models that come to a running pool, and go: the instance, the front and the router in step."""

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aegaeon.core.config import PoolConfig, with_model
from aegaeon.core.errors import AegaeonError, OrderRefused
from aegaeon.instance_process import InstanceProcess
from aegaeon.pool_check import check_pool
from aegaeon.server.app import Router
from aegaeon.server.metrics import FrontMetrics
from aegaeon.supervisor import Supervisor

if TYPE_CHECKING:
    from aegaeon.vllm_plugin.front import Front

logger = logging.getLogger(__name__)

_ABORT_TRIES, _ABORT_INTERVAL_S = 40, 0.05


class Roster:
    """Changes which models a running pool has, one at a time. What fails leaves all as it was."""

    def __init__(
        self,
        pool: PoolConfig,
        supervisor: Supervisor,
        front: "Front",
        router: Router,
        metrics: FrontMetrics,
    ) -> None:
        self._pool = pool
        self._supervisor = supervisor
        self._front = front
        self._router = router
        self._metrics = metrics
        self._changing = asyncio.Lock()
        # Not served any more, and not out of the instance yet.
        self._left: set[str] = set()

    async def add(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Load one more model, while the others wait, and serve it; its description.

        entry: as in the pool file's `models`, its paths absolute.
        Raises ConfigError (the entry), ModelLoadError, CapacityError (it cannot fit), OrderRefused
        (vLLM does not load it), InstanceDied, InstanceUnavailable.
        """
        async with self._changing:
            instance = self._supervisor.ready_instance()
            for left in sorted(self._left):
                await self._withdraw(instance, left)
            pool = self._pool.model_copy(update={"models": self._supervisor.models})
            pool = with_model(pool, entry)
            await asyncio.to_thread(check_pool, pool)
            model, addresses = pool.models[-1], instance.new_addresses()
            description = await instance.ask(
                "add",
                timeout_s=None,
                model=model.model_dump(mode="json"),
                addresses=addresses,
            )
            try:
                serving = self._front.serve(model, addresses)
                await self._router.add(await instance.unless_it_dies(serving))
            except BaseException as error:
                await self._withdraw(instance, model.name)
                if isinstance(error, AegaeonError) or not isinstance(error, Exception):
                    raise
                # Whatever vLLM's application raises when it is built.
                raise OrderRefused(f"{model.name!r} cannot be served: {error!r}") from error
            self._supervisor.host(model)
            self._metrics.add(model.name)
            logger.info("the model %s has come", model.name)
            return dict(description)

    async def remove(self, name: str, *, timeout_s: float) -> None:
        """Serve a model no longer, and give back all that it has, when its open requests have
        ended.

        Raises UnknownModel; OrderRefused when they have not within `timeout_s`, or it is the last;
        InstanceDied, InstanceUnavailable.
        """
        async with self._changing:
            instance = self._supervisor.ready_instance()
            if [model.name for model in self._supervisor.models] == [name]:
                raise OrderRefused(f"{name!r} is the only model: add another first, or stop")
            await self._router.remove(name, timeout_s=timeout_s)
            # From here on it goes: an instance that dies is followed by one without it.
            self._supervisor.unhost(name)
            self._metrics.remove(name)
            await self._withdraw(instance, name)
            logger.info("the model %s has gone", name)

    async def _withdraw(self, instance: InstanceProcess, name: str) -> None:
        self._left.discard(name)
        self._front.leave(name)
        instance.failures.pop(name, None)  # the name is free
        for _ in range(_ABORT_TRIES):
            try:
                await instance.ask("remove", timeout_s=None, model=name)
                return
            except OrderRefused:
                # An abort, the last thing that its client has sent, is still on its way.
                await asyncio.sleep(_ABORT_INTERVAL_S)
            except AegaeonError as error:
                logger.warning("the model %s is not removed from the instance: %s", name, error)
                return
        self._left.add(name)
        logger.warning("the model %s stays in the instance: it has requests without a client", name)
