"""Composes a running pool: the instance process, the front in this process, the admin listener.

Owns what must not outlive it: the instance, the folder with the sockets, the listening sockets.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import uvicorn
from prometheus_client import REGISTRY, generate_latest

import aegaeon_kernels as ak
from aegaeon import checkpoint
from aegaeon.core import envs
from aegaeon.core.config import PoolConfig, format_bytes
from aegaeon.core.control import Channel, InstanceSpec, answered_error
from aegaeon.core.errors import (
    AegaeonError,
    CapacityError,
    ConfigError,
    InstanceDied,
    ModelLoadError,
)
from aegaeon.core.serving import ServedModel
from aegaeon.core.threads import in_daemon_thread
from aegaeon.server.admin import admin_app
from aegaeon.server.admin_client import RUNTIME_DIR_PREFIX, SOCKET_NAME, is_answered
from aegaeon.server.app import Limits, Router
from aegaeon.server.auth import ApiKeys

if TYPE_CHECKING:
    from aegaeon.vllm_plugin.front import Front

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


# Less than this is no place for blocks of a real model.
MIN_HOST_KV_BYTES = 2 << 20
STOP_GRACE_S = 2.0
ANSWER_TIMEOUT_S = 5.0


def check_pool(pool: PoolConfig) -> None:
    """Everything about `pool` that can be checked without starting a process.

    Raises ModelLoadError for a checkpoint whose files are not right, CapacityError for a model
    that could never be resident, for one that would not fit beside the pinned ones, and for a
    pool whose host images would not fit into `host_memory`.
    """
    device_memory_bytes = resolve_device_memory(pool)
    needs = {
        model.name: (checkpoint.weight_bytes(model.name, Path(model.model)), model.kv_memory)
        for model in pool.models
        if Path(model.model).is_dir()
    }
    images = sum(weights for weights, _ in needs.values())
    host_kv = pool.host_kv_memory or MIN_HOST_KV_BYTES
    if images + host_kv > pool.host_memory:
        raise CapacityError(
            f"the host images of all models need {format_bytes(images)}, and swapped KV needs "
            f"{format_bytes(host_kv)}; host_memory is {format_bytes(pool.host_memory)}: raise it, "
            f"or serve fewer models",
            needed_bytes=images + host_kv,
            available_bytes=pool.host_memory,
        )
    pinned = {model.name for model in pool.models if model.pin}
    for model in pool.models:
        if model.name not in needs:
            continue
        weights, kv = needs[model.name]
        beside = sum(sum(needs[name]) for name in pinned - {model.name} if name in needs)
        if weights + kv + beside > device_memory_bytes:
            others = f", beside pinned models of {format_bytes(beside)}" if beside else ""
            raise CapacityError(
                f"model {model.name!r} needs {format_bytes(weights)} weights + "
                f"{format_bytes(kv)} kv_memory = {format_bytes(weights + kv)}{others}, "
                f"device_memory is {format_bytes(device_memory_bytes)}: raise device_memory or "
                f"lower the model's kv_memory",
                needed_bytes=weights + kv,
                available_bytes=device_memory_bytes - beside,
            )


def resolve_device(pool: PoolConfig) -> str:
    """`host` or `cuda:N`."""
    available = ak.Device.available()
    if pool.device == "auto":
        return next((name for name in available if name != "host"), "host")
    wanted = "cuda:0" if pool.device == "cuda" else pool.device
    if wanted not in available:
        raise AegaeonError(
            f"device: {pool.device} is not there; this machine has: {', '.join(available)}"
        )
    return wanted


def resolve_host_kv_memory(pool: PoolConfig) -> int:
    """Bytes of the host KV store, for a pool that `check_pool` has passed."""
    if pool.host_kv_memory is not None:
        return pool.host_kv_memory
    images = sum(
        checkpoint.weight_bytes(model.name, Path(model.model))
        for model in pool.models
        if Path(model.model).is_dir()
    )
    wanted = sum(model.kv_memory for model in pool.models)
    return max(MIN_HOST_KV_BYTES, min(wanted, pool.host_memory - images))


def resolve_device_memory(pool: PoolConfig) -> int:
    """The arena's capacity in bytes: a whole number of pages of the device."""
    device = ak.Device(resolve_device(pool))
    _, total = device.memory_info()
    if device.kind == "host":
        total = psutil.virtual_memory().total
    wanted = pool.device_memory.resolve(total)
    return wanted // device.granularity_bytes * device.granularity_bytes


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
        listener = _listen(pool.server.host, pool.server.port)
        stack.callback(listener.close)
        runtime_dir = Path(tempfile.mkdtemp(prefix=RUNTIME_DIR_PREFIX))
        stack.callback(shutil.rmtree, runtime_dir, ignore_errors=True)
        admin_listener = stack.enter_context(_unix_listener(_admin_socket_path(pool, runtime_dir)))
        instance = InstanceProcess(pool, runtime_dir)
        stack.callback(instance.stop)
        with suppress(KeyboardInterrupt, asyncio.CancelledError):
            asyncio.run(_run(pool, instance, listener, admin_listener, api_keys, on_ready))


class InstanceProcess:
    """The instance: started here, asked, watched, and ended by `stop`."""

    def __init__(self, pool: PoolConfig, runtime_dir: Path) -> None:
        self.device = resolve_device(pool)
        self.device_kind = "host" if self.device == "host" else "cuda"
        self.addresses = {
            model.name: {
                "input_address": f"ipc://{runtime_dir}/{index}.in",
                "output_address": f"ipc://{runtime_dir}/{index}.out",
            }
            for index, model in enumerate(pool.models)
        }
        ours, theirs = Pipe()
        self._process = _spawn_instance(theirs, self.device)
        theirs.close()
        self._channel = Channel(ours)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._next_question = 0
        self._loaded: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._died = asyncio.Event()
        self._failure: AegaeonError | None = None
        self._channel.send(
            InstanceSpec(
                # The process sees the one GPU that it uses, and so do vLLM and the arena in it.
                device="host" if self.device == "host" else "cuda:0",
                device_memory_bytes=resolve_device_memory(pool),
                host_memory_bytes=pool.host_memory,
                host_kv_memory_bytes=resolve_host_kv_memory(pool),
                runtime_dir=str(runtime_dir),
                policy=pool.scheduler.policy,
                quantum=pool.scheduler.quantum,
                image_cache_directory=pool.image_cache.directory,
                image_cache_max_bytes=pool.image_cache.max_size,
                models=pool.models,
                addresses=self.addresses,
            ).to_message()
        )

    def watch(self) -> None:
        """Start to take in the instance's messages, on the running event loop."""
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._receive, args=(loop,), name="instance-control", daemon=True
        ).start()

    def _receive(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            message = self._channel.receive()
            with suppress(RuntimeError):  # the loop is closed: we are stopping
                loop.call_soon_threadsafe(self._take, message)
            if message is None:
                return

    def _take(self, message: dict[str, Any] | None) -> None:
        match message:
            case None:
                self._died.set()
                self._loaded.put_nowait(None)
                for waiting in self._answers.values():
                    waiting.cancel()
            case {"event": "load_failed"}:
                # Kept aside: the start may be waiting for an earlier model, not for this message.
                self._failure = _load_error(message)
            case {"answer": number}:
                future = self._answers.get(number)
                if future is None or future.done():
                    return
                if "error" in message:
                    future.set_exception(answered_error(message))
                else:
                    future.set_result(message["value"])
            case _:
                self._loaded.put_nowait(message)

    async def next_loaded(self) -> str | None:
        """The name of the next model that has been loaded; None when all have been."""
        message = await self._loaded.get()
        match message:
            case {"event": "loaded", "model": name}:
                return str(name)
            case {"event": "ready"}:
                return None
        raise self.death()

    async def unless_it_dies(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which waits for the instance. Raises InstanceDied if it ends."""
        task = asyncio.ensure_future(work)
        death = asyncio.ensure_future(self._died.wait())
        try:
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self.death()
            return task.result()
        finally:
            task.cancel()
            death.cancel()

    async def ask(
        self, question: str, *, timeout_s: float | None = ANSWER_TIMEOUT_S, **arguments: Any
    ) -> Any:
        """What the instance answers to `question`.

        Raises InstanceDied when it is gone, TimeoutError, and the error that it answers with.
        """
        number = self._next_question
        self._next_question += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self._channel.send({"ask": question, "id": number, "with": arguments})
            return await asyncio.wait_for(future, timeout_s)
        except (OSError, asyncio.CancelledError):
            if self._died.is_set():
                raise self.death() from None
            raise
        finally:
            self._answers.pop(number, None)

    def alive(self) -> bool:
        return not self._died.is_set() and self._process.poll() is None

    async def wait_for_death(self) -> None:
        await self._died.wait()

    def death(self) -> AegaeonError:
        """Why the instance is gone: the model that could not be loaded, or its exit status."""
        if self._failure is not None:
            return self._failure
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return InstanceDied(self.device, self._process.returncode)

    def stop(self) -> None:
        """End the process: politely, then not."""
        with suppress(OSError):
            self._channel.send({"ask": "stop"})
        try:
            self._process.wait(timeout=STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            # The group: vLLM may be inspecting a model in a process of its own.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._channel.close()


def _load_error(message: Mapping[str, Any]) -> AegaeonError:
    """The instance's report of a failed load, as the exception it was over there."""
    reason = str(message["message"])
    if message["kind"] == "config":
        return ConfigError(reason)
    # Our own messages name the model themselves.
    return AegaeonError(reason) if message["own"] else ModelLoadError(message["model"], reason)


def _spawn_instance(theirs: Connection, device: str) -> subprocess.Popen[bytes]:
    changes: dict[str, str | None] = {"AEGAEON_ENABLE": "1"}
    if device != "host":
        index = int(device.removeprefix("cuda:"))
        visible = envs.lookup("CUDA_VISIBLE_DEVICES")
        changes["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    return subprocess.Popen(
        [sys.executable, "-m", "aegaeon.vllm_plugin.instance", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=envs.child_environment(changes),
        stdin=subprocess.DEVNULL,
        # Standard output is for the launcher's own lines; vLLM logs there.
        stdout=sys.__stderr__,
        # Ctrl-C in a terminal reaches the launcher alone; it ends the instance.
        process_group=0,
    )


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
        router = _router(pool, served, instance, api_keys)
        public = _Server(_uvicorn_config(router, lifespan="on"))
        admin = _Server(_uvicorn_config(admin_app(instance.ask), lifespan="off"))
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
) -> Router:
    async def metrics() -> str:
        return generate_latest(REGISTRY).decode() + str(await instance.ask("metrics"))

    async def states() -> dict[str, str]:
        return {model["name"]: model["state"] for model in (await instance.ask("state"))["models"]}

    async def admit(model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
        answer = await instance.ask(
            "admit", model=model, prompt_tokens=prompt_tokens, ttft_ms=ttft_ms
        )
        return float(answer)

    return Router(
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


class _Server(uvicorn.Server):
    """Without signal handlers of its own: there are two servers, and one decision to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(app: Any, *, lifespan: Literal["on", "off"]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan=lifespan,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        server_header=False,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket; taken before anything is loaded, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise AegaeonError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def _admin_socket_path(pool: PoolConfig, runtime_dir: Path) -> Path:
    return runtime_dir / SOCKET_NAME if pool.admin.socket == "auto" else Path(pool.admin.socket)


@contextmanager
def _unix_listener(path: Path) -> Iterator[socket.socket]:
    """A bound unix socket that only this user may use; its file goes with it.

    The file of a server that was killed is taken over; that of a running one is not.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if path.is_socket() and not is_answered(path):
            path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise AegaeonError(
                f"cannot create the admin socket {path}: {error.strerror}"
            ) from error
        finally:
            os.umask(mask)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
