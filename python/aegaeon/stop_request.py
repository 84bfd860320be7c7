"""How a running server is asked to end: by signals, or because it cannot go on."""

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine
from typing import Any

import uvicorn

from aegaeon.server.app import Router
from aegaeon.server.open_requests import Unavailable

logger = logging.getLogger(__name__)

_DRAINING = Unavailable("draining", "the server is about to end", retry_after_s=1)
_STOPPING = Unavailable("stopping", "the server ends")
_LOOK_INTERVAL_S = 0.05


_NO_INSTANCE = Unavailable("instance_down", "the instance cannot be kept running; the server ends")


class StopRequest:
    """SIGTERM drains: open requests may end first. SIGINT, or a second signal, does not wait.

    drain_timeout_s: how long they may take. Before there is a server, both cancel the start.
    Created in the task that is cancelled.
    """

    def __init__(self, drain_timeout_s: float) -> None:
        self.drain_timeout_s = drain_timeout_s
        self._server: uvicorn.Server | None = None
        self._router: Router | None = None
        self._ending: asyncio.Task[None] | None = None
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._arrived, number)

    def then(self, router: Router, server: uvicorn.Server) -> None:
        """From now on end `server`, and let `router` tell the clients."""
        self._router, self._server = router, server

    def after(self, task: "asyncio.Task[None]") -> None:
        """End the server because `task` has ended, which it never should."""
        if not task.cancelled():
            self._begin(self._end(_NO_INSTANCE))

    def _arrived(self, number: int) -> None:
        if self._server is None:
            if self._main is not None:
                self._main.cancel()
        elif number == signal.SIGTERM and self._ending is None:
            self._begin(self._drain())
        else:
            self._begin(self._end(_STOPPING))

    def _begin(self, ending: Coroutine[Any, Any, None]) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.ensure_future(ending)

    async def _drain(self) -> None:
        assert self._router is not None
        deadline_s = time.monotonic() + self.drain_timeout_s
        self._router.refuse(_DRAINING)
        logger.info("draining: %d requests are open", self._router.num_open())
        while self._router.num_open() and time.monotonic() < deadline_s:
            await asyncio.sleep(_LOOK_INTERVAL_S)
        await self._end(_STOPPING)

    async def _end(self, why: Unavailable) -> None:
        assert self._router is not None
        assert self._server is not None
        await self._router.suspend(why)
        self._server.should_exit = True
