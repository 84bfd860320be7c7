"""Composes a running pool: the instance process, the front in this process, the admin listener.

Owns what must not outlive it: the instance, the folder with the sockets, the listening sockets.
"""

import asyncio
import logging
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import REGISTRY, generate_latest

from aegaeon.core import envs
from aegaeon.core.clock import MonotonicClock
from aegaeon.core.config import PoolConfig
from aegaeon.core.serving import ServedModel
from aegaeon.core.threads import in_daemon_thread
from aegaeon.instance_process import InstanceProcess
from aegaeon.listeners import Server, tcp_listener, unix_listener, uvicorn_config
from aegaeon.pool_check import check_pool
from aegaeon.server.admin import admin_app
from aegaeon.server.admin_client import RUNTIME_DIR_PREFIX, SOCKET_NAME
from aegaeon.server.app import Limits, Router
from aegaeon.server.auth import ApiKeys
from aegaeon.server.metrics import FrontMetrics
from aegaeon.server.observed import Observed

if TYPE_CHECKING:
    from aegaeon.vllm_plugin.front import Front

logger = logging.getLogger(__name__)


def serve(pool: PoolConfig, *, on_ready: Callable[[str], None] = print) -> None:
    """Run the pool until SIGINT or SIGTERM; returns after everything has ended.

    on_ready: called with the address once requests are answered.
    Raises AegaeonError when the pool cannot be started, InstanceDied when the instance ends by
    itself.
    """
    check_pool(pool)
    envs.set_vllm_defaults()
    with ExitStack() as stack:
        # What can be refused is refused before anything is loaded.
        keys = pool.server.api_keys_file
        api_keys = None if keys is None else ApiKeys(Path(keys))
        listener = tcp_listener(pool.server.host, pool.server.port)
        stack.callback(listener.close)
        runtime_dir = Path(tempfile.mkdtemp(prefix=RUNTIME_DIR_PREFIX))
        stack.callback(shutil.rmtree, runtime_dir, ignore_errors=True)
        admin_listener = stack.enter_context(unix_listener(_admin_socket_path(pool, runtime_dir)))
        instance = InstanceProcess(pool, runtime_dir)
        stack.callback(instance.stop)
        with suppress(KeyboardInterrupt, asyncio.CancelledError):
            asyncio.run(_run(pool, instance, listener, admin_listener, api_keys, on_ready))


async def _run(
    pool: PoolConfig,
    instance: InstanceProcess,
    listener: socket.socket,
    admin_listener: socket.socket,
    api_keys: ApiKeys | None,
    on_ready: Callable[[str], None],
) -> None:
    stop = _StopRequest()
    instance.watch()
    # vLLM's imports take seconds; the instance does its own at the same time.
    importing = in_daemon_thread(lambda: _make_front(instance.device_kind))
    front = await instance.unless_it_dies(importing)
    try:
        served = []
        by_name = {model.name: model for model in pool.models}
        while (name := await instance.next_loaded()) is not None:
            serving = front.serve(by_name[name], instance.addresses[name])
            served.append(await instance.unless_it_dies(serving))
            logger.info("model %s is ready", name)
        router, metrics = _router(pool, served, instance, api_keys)
        observed = Observed(router, clock=MonotonicClock(), ended=(metrics.ended,))
        public = Server(uvicorn_config(observed, lifespan="on"))
        admin_routes = admin_app(instance.ask, metrics.snapshot)
        admin = Server(uvicorn_config(admin_routes, lifespan="off"))
        stop.then(public)
        background = [
            asyncio.create_task(_end_on_death(instance, front, public)),
            asyncio.create_task(_announce(public, listener, on_ready)),
        ]
        admin_task = asyncio.create_task(admin.serve(sockets=[admin_listener]))
        try:
            await public.serve(sockets=[listener])
        finally:
            admin.should_exit = True
            await admin_task
            for task in background:
                task.cancel()
        if not instance.alive():
            raise instance.death()
    finally:
        front.close()


def _make_front(device_kind: str) -> "Front":
    from aegaeon.vllm_plugin.front import Front

    return Front(device_kind)


def _router(
    pool: PoolConfig,
    served: Sequence[ServedModel],
    instance: InstanceProcess,
    api_keys: ApiKeys | None,
) -> tuple[Router, FrontMetrics]:
    async def metrics() -> str:
        own = str(await instance.ask("metrics"))
        return generate_latest(REGISTRY).decode() + front.exposition() + own

    async def states() -> dict[str, str]:
        return {model["name"]: model["state"] for model in (await instance.ask("state"))["models"]}

    async def admit(model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
        answer = await instance.ask(
            "admit", model=model, prompt_tokens=prompt_tokens, ttft_ms=ttft_ms
        )
        return float(answer)

    router = Router(
        served,
        limits=Limits(
            max_body_bytes=pool.server.max_body_bytes,
            max_open_requests=pool.server.max_queued_requests,
        ),
        metrics=metrics,
        states=states,
        alive=instance.alive,
        admit=admit if pool.scheduler.admission == "deadline" else None,
        api_keys=api_keys,
    )
    front = FrontMetrics([model.name for model in served], router.num_open)
    return router, front


async def _end_on_death(instance: InstanceProcess, front: "Front", public: uvicorn.Server) -> None:
    """When the instance ends by itself: end its requests with an error, then the server."""
    await instance.wait_for_death()
    logger.error("%s", instance.death())
    front.instance_died()
    public.should_exit = True


async def _announce(
    public: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None]
) -> None:
    while not public.started:
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()[:2]
    on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


class _StopRequest:
    """SIGINT and SIGTERM: before there is a server they cancel the start, later they end it."""

    def __init__(self) -> None:
        self._server: uvicorn.Server | None = None
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._arrived)

    def then(self, server: uvicorn.Server) -> None:
        self._server = server

    def _arrived(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        elif self._main is not None:
            self._main.cancel()


def _admin_socket_path(pool: PoolConfig, runtime_dir: Path) -> Path:
    return runtime_dir / SOCKET_NAME if pool.admin.socket == "auto" else Path(pool.admin.socket)
