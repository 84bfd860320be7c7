"""Composes a running pool: the instance process, the front in this process, the admin listener.

Owns what must not outlive it: the instance, the folder with the sockets, the listening sockets.
"""

import asyncio
import logging
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import REGISTRY, generate_latest

from aegaeon.core import envs
from aegaeon.core.config import PoolConfig
from aegaeon.core.errors import AegaeonError
from aegaeon.core.threads import in_daemon_thread
from aegaeon.listeners import Server, allow_many_files, tcp_listener, unix_listener, uvicorn_config
from aegaeon.observers import Observers
from aegaeon.pool_check import check_pool
from aegaeon.pool_reload import PoolReload, PoolSource
from aegaeon.roster import Roster
from aegaeon.server.admin import admin_app
from aegaeon.server.admin_client import RUNTIME_DIR_PREFIX, SOCKET_NAME
from aegaeon.server.app import Admit, Limits, Router
from aegaeon.server.auth import ApiKeys, WithKey
from aegaeon.server.metrics import FrontMetrics
from aegaeon.server.protocol import OwnUserProtocol
from aegaeon.stop_request import StopRequest
from aegaeon.supervisor import Supervisor
from aegaeon.watched_files import watch_files

if TYPE_CHECKING:
    from aegaeon.vllm_plugin.front import Front

logger = logging.getLogger(__name__)


def serve(
    pool: PoolConfig,
    *,
    on_ready: Callable[[str], None] = print,
    source: PoolSource | None = None,
) -> None:
    """Run the pool until SIGINT or SIGTERM; returns after everything has ended.

    on_ready: called with the address once requests are answered.
    source: where the pool was read from; what can be changed without a restart follows it.
    Raises AegaeonError when the pool cannot be started, RestartsExhausted when the instance dies
    again and again.
    """
    check_pool(pool)
    envs.set_vllm_defaults()
    with ExitStack() as stack:
        # What can be refused is refused before anything is loaded.
        runtime_dir = Path(tempfile.mkdtemp(prefix=RUNTIME_DIR_PREFIX))
        stack.callback(shutil.rmtree, runtime_dir, ignore_errors=True)
        doors = _open_doors(pool, runtime_dir, stack)
        allow_many_files()
        supervisor = Supervisor(pool, runtime_dir)
        stack.callback(supervisor.stop)
        with suppress(KeyboardInterrupt, asyncio.CancelledError):
            asyncio.run(_run(pool, supervisor, doors, on_ready, source))


@dataclass(frozen=True)
class _Doors:
    """Where the server listens, and who is let in."""

    public: socket.socket
    admin: socket.socket
    admin_port: socket.socket | None
    api_keys: ApiKeys | None
    admin_keys: ApiKeys | None

    def keys_files(self) -> dict[Path, Callable[[], None]]:
        """What is to be read again when it changes."""
        return {keys.path: keys.reload for keys in (self.api_keys, self.admin_keys) if keys}


def _open_doors(pool: PoolConfig, runtime_dir: Path, stack: ExitStack) -> _Doors:
    keys, admin_keys = (
        None if file is None else ApiKeys(Path(file))
        for file in (pool.server.api_keys_file, pool.admin.keys_file)
    )
    public = stack.enter_context(tcp_listener(pool.server.host, pool.server.port))
    admin_port = None
    if pool.admin.port is not None:
        admin_port = stack.enter_context(tcp_listener("127.0.0.1", pool.admin.port))
    admin = stack.enter_context(unix_listener(_admin_socket_path(pool, runtime_dir)))
    return _Doors(public, admin, admin_port, keys, admin_keys)


async def _run(
    pool: PoolConfig,
    supervisor: Supervisor,
    doors: _Doors,
    on_ready: Callable[[str], None],
    source: PoolSource | None,
) -> None:
    stop = StopRequest(pool.server.drain_timeout)
    first = supervisor.instance
    first.watch()
    # vLLM's imports take seconds; the instance does its own at the same time.
    front = await first.unless_it_dies(
        in_daemon_thread(lambda: _make_front(pool, first.device_kind))
    )
    router, metrics = _router(pool, supervisor, doors.api_keys)
    observers = Observers(pool.observability, metrics, supervisor.ask)

    async def follow(old: PoolConfig, new: PoolConfig) -> None:
        await supervisor.reconfigure(old, new)
        router.reconfigure(
            limits=_limits(new),
            admit=_admit(new, supervisor),
            aliases={model.name: model.aliases for model in new.models},
        )
        stop.drain_timeout_s = new.server.drain_timeout

    try:
        await supervisor.bring_up(front, router)
        public = Server(uvicorn_config(observers.around(router)))
        closing = asyncio.Event()
        roster = Roster(pool, supervisor, front, router, metrics)
        routes = admin_app(supervisor.ask, metrics.snapshot, roster, closing=closing)
        admins = {Server(uvicorn_config(routes, http=OwnUserProtocol)): doors.admin}
        if doors.admin_port is not None and doors.admin_keys is not None:
            with_key = WithKey(routes, doors.admin_keys)
            admins[Server(uvicorn_config(with_key))] = doors.admin_port
        stop.then(router, public)
        supervising = asyncio.create_task(supervisor.run(front, router))
        supervising.add_done_callback(stop.after)
        watched = doors.keys_files()
        if source is not None:
            watched[source.path] = PoolReload(source, pool, follow, roster).changed
        background = [
            supervising,
            asyncio.create_task(_announce(public, doors.public, on_ready)),
            asyncio.create_task(watch_files(watched)),
        ]
        serving = [
            asyncio.create_task(admin.serve(sockets=[listener]))
            for admin, listener in admins.items()
        ]
        try:
            await public.serve(sockets=[doors.public])
        finally:
            closing.set()
            for admin in admins:
                admin.should_exit = True
            await asyncio.gather(*serving)
            for task in background:
                task.cancel()
        if supervising.done():
            supervising.result()
    finally:
        await observers.close()
        front.close()


def _make_front(pool: PoolConfig, device_kind: str) -> "Front":
    from aegaeon.vllm_plugin.front import Front

    return Front(device_kind, [name for model in pool.models for name in model.names])


def _router(
    pool: PoolConfig, supervisor: Supervisor, api_keys: ApiKeys | None
) -> tuple[Router, FrontMetrics]:
    async def metrics() -> str:
        try:
            own = str(await supervisor.ask("metrics"))
        except (AegaeonError, TimeoutError):
            own = ""  # aegaeon_instance_up says so, and the front's own series go on
        return generate_latest(REGISTRY).decode() + front.exposition() + own

    async def states() -> dict[str, str]:
        state = await supervisor.ask("state")
        return {model["name"]: model["state"] for model in state["models"]}

    router = Router(
        limits=_limits(pool),
        metrics=metrics,
        states=states,
        admit=_admit(pool, supervisor),
        failures=lambda: supervisor.instance.failures,
        api_keys=api_keys,
    )
    front = FrontMetrics(
        [model.name for model in pool.models],
        router.num_open,
        lambda: (supervisor.serves, supervisor.num_restarts),
    )
    return router, front


def _limits(pool: PoolConfig) -> Limits:
    return Limits(
        max_body_bytes=pool.server.max_body_bytes,
        max_open_requests=pool.server.max_queued_requests,
        max_open_total=pool.server.max_open_requests,
        max_n=pool.server.max_n,
    )


def _admit(pool: PoolConfig, supervisor: Supervisor) -> Admit | None:
    async def admit(model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
        answer = await supervisor.ask(
            "admit", model=model, prompt_tokens=prompt_tokens, ttft_ms=ttft_ms
        )
        return float(answer)

    return admit if pool.scheduler.admission == "deadline" else None


async def _announce(
    public: uvicorn.Server, listener: socket.socket, on_ready: Callable[[str], None]
) -> None:
    while not public.started:
        await asyncio.sleep(0.01)
    host, port = listener.getsockname()[:2]
    on_ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def _admin_socket_path(pool: PoolConfig, runtime_dir: Path) -> Path:
    return runtime_dir / SOCKET_NAME if pool.admin.socket == "auto" else Path(pool.admin.socket)
