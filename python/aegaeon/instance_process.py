"""The instance as its launcher sees it: a process that is started, asked, watched and ended."""

import asyncio
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from aegaeon.core import envs
from aegaeon.core.config import ModelConfig, PoolConfig
from aegaeon.core.control import Channel, InstanceSpec, answered_error
from aegaeon.core.errors import (
    AegaeonError,
    ConfigError,
    DeviceLost,
    InstanceDied,
    ModelLoadError,
)
from aegaeon.pool_check import resolve_device, resolve_device_memory, resolve_host_kv_memory

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
ANSWER_TIMEOUT_S = 5.0


class InstanceProcess:
    """The instance: started here, asked, watched, and ended by `stop`.

    pool, models: what it hosts. runtime_dir: removed by the instance when this process is gone.
    socket_dir: takes the sockets of the engine cores.
    Only from the main thread: the instance is told when the thread that started it ends.
    """

    def __init__(
        self,
        pool: PoolConfig,
        models: Sequence[ModelConfig],
        *,
        runtime_dir: Path,
        socket_dir: Path,
    ) -> None:
        self.device = resolve_device(pool)
        self.device_kind = "host" if self.device == "host" else "cuda"
        self.models = {model.name: model for model in models}
        self._socket_dir = socket_dir
        self._next_address = 0
        self.addresses = {model.name: self.new_addresses() for model in models}
        ours, theirs = Pipe()
        self._process = _spawn_instance(theirs, self.device)
        theirs.close()
        self._channel = Channel(ours)
        # Sent by a thread: an instance that does not read must not hold up the event loop.
        self._outgoing: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._send, name="instance-orders", daemon=True).start()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._next_question = 0
        self._loaded: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._stopped = False
        self._died = asyncio.Event()
        self._failure: AegaeonError | None = None
        # Models out of service, and why.
        self.failures: dict[str, str] = {}
        self._outgoing.put(
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
                models=tuple(models),
                addresses=self.addresses,
            ).to_message()
        )

    def new_addresses(self) -> dict[str, str]:
        """Of the sockets of one more engine core."""
        index, self._next_address = self._next_address, self._next_address + 1
        return {
            "input_address": f"ipc://{self._socket_dir}/{index}.in",
            "output_address": f"ipc://{self._socket_dir}/{index}.out",
        }

    def watch(self) -> None:
        """Start to take in the instance's messages, on the running event loop."""
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._receive, args=(loop,), name="instance-control", daemon=True
        ).start()

    def _send(self) -> None:
        while (message := self._outgoing.get()) is not None:
            try:
                self._channel.send(message)
            except OSError:
                return  # it is gone, which the receiving thread reports

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
            case {"event": "failed", "model": name, "message": reason}:
                self.failures[name] = reason
                logger.error("model %s is out of service: %s", name, reason)
            case {"event": "device_lost", "message": reason}:
                self._failure = DeviceLost(str(reason))
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
        if self._died.is_set():
            raise self.death()
        number = self._next_question
        self._next_question += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self._outgoing.put({"ask": question, "id": number, "with": arguments})
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.CancelledError:
            if self._died.is_set() and future.cancelled():
                raise self.death() from None
            raise
        finally:
            self._answers.pop(number, None)

    def alive(self) -> bool:
        """Whether it can still be asked."""
        return not self._died.is_set()

    async def wait_for_death(self) -> None:
        await self._died.wait()

    def death(self) -> AegaeonError:
        """Why the instance is gone: what it has reported, or its exit status."""
        if self._failure is not None:
            return self._failure
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return InstanceDied(self.device, self._process.returncode)

    def kill(self) -> None:
        """End it at once, as one does with what does not listen any more."""
        if self._process.poll() is None:
            _kill_group(self._process.pid)

    def stop(self) -> None:
        """End the process, politely, then not, and what it has started; none is left afterwards.

        Does nothing when it has been stopped before.
        """
        if self._stopped:
            return
        self._stopped = True
        self._outgoing.put({"ask": "stop"})
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=STOP_GRACE_S)
        # The group: vLLM may be inspecting a model in a process of its own, which outlives it.
        _kill_group(self._process.pid)
        self._process.wait()
        self._outgoing.put(None)
        self._channel.close()


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


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
