"""Blocking calls beside an event loop, and queues whose threads can be ended."""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

_T = TypeVar("_T")


async def in_daemon_thread(function: Callable[[], _T]) -> _T:
    """The result of `function`, run in a thread of its own.

    Unlike `asyncio.to_thread`, whose threads are joined when the loop ends: a call that never
    returns does not keep the process from stopping.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(_T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=getattr(function, "__name__", "call"), daemon=True).start()
    return await future


class QueueClosed(Exception):
    """The queue is closed. Ends the thread that works on it; see ClosableQueue."""


class ClosableQueue(queue.Queue[Any]):
    """A queue whose threads end: once closed, `put` and a `get` that finds it empty raise
    QueueClosed.

    wake: set after each item, for a reader that waits for more than this queue.
    """

    _END = object()

    def __init__(self, wake: threading.Event | None = None) -> None:
        super().__init__()
        self._wake = wake
        self._closed = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if self._closed:
            raise QueueClosed
        super().put(item, block, timeout)
        if self._wake is not None:
            self._wake.set()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        item = super().get(block, timeout)
        if item is self._END:
            super().put(item)  # for whoever else reads
            raise QueueClosed
        return item

    def close(self) -> None:
        self._closed = True
        super().put(self._END)
