"""Keeps one instance alive under the front: notices that it died or hangs, and starts a new one."""

import asyncio
import logging
import shutil
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegaeon.core.changes import LIVE_MODEL_KEYS
from aegaeon.core.config import ModelConfig, PoolConfig
from aegaeon.core.errors import (
    AegaeonError,
    InstanceDied,
    InstanceUnavailable,
    OrderRefused,
    RestartsExhausted,
    UnknownModel,
)
from aegaeon.core.serving import unserved
from aegaeon.core.threads import in_daemon_thread
from aegaeon.instance_process import ANSWER_TIMEOUT_S, InstanceProcess
from aegaeon.server.app import Router
from aegaeon.server.open_requests import Unavailable

if TYPE_CHECKING:
    from aegaeon.vllm_plugin.front import Front

logger = logging.getLogger(__name__)

# Before the n-th restart within the window. The first is at once: most deaths have no successor.
BACK_OFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
PULSE_INTERVAL_S = 1.0
# How often a question that is not answered is looked at.
_LOOK_INTERVAL_S = 0.25


class Supervisor:
    """The instance of a pool, for as long as the server runs: always the same, seldom the same one.

    pool: its settings. runtime_dir: for the sockets; belongs to the caller.
    Only from the main thread. The first instance is started by the constructor, so that it comes up
    while the front does.
    """

    def __init__(self, pool: PoolConfig, runtime_dir: Path) -> None:
        self._pool = pool
        self._runtime_dir = runtime_dir
        self._models: dict[str, ModelConfig] = {model.name: model for model in pool.models}
        # What operators have ordered, so that a new instance has it as well.
        self._loaded: set[str] = set()
        self._generation = 0
        self._restarts: deque[float] = deque()
        self._ready = False
        self._start_s = 5.0
        self._stalled = False
        self.instance = self._spawn()

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """What the instance hosts, and the next one will."""
        return tuple(self._models.values())

    def host(self, model: ModelConfig) -> None:
        """From now on every new instance hosts `model`; the present one does already."""
        self._models[model.name] = model

    def unhost(self, name: str) -> None:
        """No new instance hosts `name`."""
        self._models.pop(name, None)
        self._loaded.discard(name)

    def ready_instance(self) -> InstanceProcess:
        """The instance that serves now. Raises InstanceUnavailable while there is none."""
        if not self._ready:
            raise InstanceUnavailable("the instance is being started anew")
        return self.instance

    @property
    def device_kind(self) -> str:
        """host or cuda."""
        return self.instance.device_kind

    @property
    def serves(self) -> bool:
        """Whether there is an instance that answers and gets on."""
        return self._ready and not self._stalled

    @property
    def num_restarts(self) -> int:
        """How many instances were started after the first."""
        return self._generation - 1

    async def bring_up(self, front: "Front", router: Router) -> None:
        """Have `router` serve the models of the instance, as soon as they are loaded.

        The instance is watched already. Raises what has kept the instance from it.
        """
        began, instance = time.monotonic(), self.instance
        # A model that cannot be loaded keeps its place, without an application.
        served = {name: unserved(name, model.aliases) for name, model in instance.models.items()}
        while (name := await instance.next_loaded()) is not None:
            serving = front.serve(instance.models[name], instance.addresses[name])
            served[name] = await instance.unless_it_dies(serving)
            logger.info("model %s is ready", name)
        await self._load_again()
        await router.resume(list(served.values()))
        self._ready = True
        self._start_s = time.monotonic() - began

    async def run(self, front: "Front", router: Router) -> None:
        """Start a new instance each time one dies. Raises RestartsExhausted in the end."""
        while True:
            watch = asyncio.create_task(self._watch(router))
            try:
                await self.instance.wait_for_death()
            finally:
                watch.cancel()
            self._ready = False
            why = self.instance.death()
            logger.error("%s", why)
            while True:
                await router.suspend(self._unavailable(why))
                front.instance_died()
                await self._clear_away(front)
                delay_s = self._next_delay_s(why)
                if delay_s:
                    logger.info("the next start of the instance is in %g s", delay_s)
                await asyncio.sleep(delay_s)
                failed = await self._failure_to_bring_up(front, router)
                if failed is None:
                    break
                why = failed
            logger.info("the instance is back with all models, after %.1f s", self._start_s)

    async def _failure_to_bring_up(self, front: "Front", router: Router) -> AegaeonError | None:
        limit_s = self._pool.supervision.start_timeout
        try:
            self.instance = self._spawn()
            self.instance.watch()
            async with asyncio.timeout(limit_s):
                await self.bring_up(front, router)
        except AegaeonError as error:
            logger.error("the instance does not start: %s", error)
            return error
        except TimeoutError:
            late = AegaeonError(f"the instance has not loaded its models within {limit_s:g} s")
            logger.error("%s", late)
            return late
        except Exception as error:
            # The front's half of vLLM; the next attempt begins anew.
            logger.exception("the models of the new instance cannot be served")
            return AegaeonError(f"the models of the new instance cannot be served: {error!r}")
        return None

    async def ask(
        self, question: str, *, timeout_s: float | None = ANSWER_TIMEOUT_S, **arguments: Any
    ) -> Any:
        """What the instance answers; orders are remembered for the next instance.

        Raises InstanceUnavailable while there is none, else as InstanceProcess.ask.
        """
        answer = await self.ready_instance().ask(question, timeout_s=timeout_s, **arguments)
        self._remember(question, arguments)
        return answer

    async def reconfigure(self, old: PoolConfig, new: PoolConfig) -> None:
        """Go by `new`, which differs from `old` in live keys; also in the instances to come.

        Raises as `ask` does; a pin that is refused is logged.
        """
        # Of the file's models an order may have removed some.
        models = [model for model in new.models if model.name in self._models]
        settings = {
            model.name: {
                "slo": model.slo.model_dump(),
                "priority": model.priority,
                "keep_alive": model.keep_alive,
            }
            for model in models
        }
        # Between two steps: as long as a step, or an order, takes.
        await self.ask("configure", timeout_s=None, models=settings)
        before = {model.name: model for model in old.models}
        for model in models:
            # Of what the file says only what it says anew: the rest may be an operator's order.
            was = before[model.name]
            live = [key for key in LIVE_MODEL_KEYS if getattr(model, key) != getattr(was, key)]
            update = {key: getattr(model, key) for key in live if key != "pin"}
            self._models[model.name] = self._models[model.name].model_copy(update=update)
            if model.pin == was.pin:
                continue
            try:
                await self.ask("pin" if model.pin else "unpin", timeout_s=None, model=model.name)
            except (OrderRefused, UnknownModel) as error:
                logger.error("models[%s].pin: %s", model.name, error)
        self._pool = new

    def stop(self) -> None:
        """End the instance; returns when it and all that it has started are gone."""
        self._ready = False
        self.instance.stop()

    # -- restarts --------------------------------------------------------------------------

    def _spawn(self) -> InstanceProcess:
        self._generation += 1
        self._socket_dir = self._runtime_dir / str(self._generation)
        self._socket_dir.mkdir(mode=0o700)
        return InstanceProcess(
            self._pool.model_copy(update={"models": self.models}),
            self.models,
            runtime_dir=self._runtime_dir,
            socket_dir=self._socket_dir,
        )

    async def _clear_away(self, front: "Front") -> None:
        front.close()
        await in_daemon_thread(self.instance.stop)
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _next_delay_s(self, why: AegaeonError) -> float:
        rules, now = self._pool.supervision, time.monotonic()
        while self._restarts and now - self._restarts[0] > rules.restart_window:
            self._restarts.popleft()
        if len(self._restarts) >= rules.max_restarts:
            raise RestartsExhausted(
                f"{why}; the instance has been started anew {len(self._restarts)} times within "
                f"{rules.restart_window:g} s, which is supervision.max_restarts: giving up"
            )
        delay_s = BACK_OFF_S[min(len(self._restarts), len(BACK_OFF_S) - 1)]
        self._restarts.append(now)
        return delay_s

    def _unavailable(self, why: AegaeonError) -> Unavailable:
        backing_off_s = BACK_OFF_S[min(len(self._restarts), len(BACK_OFF_S) - 1)]
        # Why an instance does not start may name paths: that is for the log.
        reason = str(why) if isinstance(why, InstanceDied) else "the instance has failed"
        return Unavailable(
            "instance_restarting",
            f"{reason}; it is being started anew, and the request can be sent again",
            retry_after_s=round(backing_off_s + self._start_s) + 1,
        )

    # -- what operators have ordered ---------------------------------------------------------

    def _remember(self, question: str, arguments: dict[str, Any]) -> None:
        name = str(arguments.get("model"))
        if name not in self._models:
            return
        match question:
            case "load":
                self._loaded.add(name)
            case "unload":
                self._loaded.discard(name)
            case "pin" | "unpin":
                pinned = self._models[name].model_copy(update={"pin": question == "pin"})
                self._models[name] = pinned

    async def _load_again(self) -> None:
        for name in sorted(self._loaded):
            try:
                await self.instance.ask("load", timeout_s=None, model=name)
            except (OrderRefused, UnknownModel) as error:
                logger.warning("the model %s is not loaded again: %s", name, error)

    # -- an instance that hangs ------------------------------------------------------------

    async def _watch(self, router: Router) -> None:
        """Ask for the pulse again and again; report that there is none, and end what has none."""
        while True:
            asked_s = time.monotonic()
            question = asyncio.ensure_future(self.instance.ask("pulse", timeout_s=None))
            try:
                while not question.done():
                    await asyncio.wait({question}, timeout=_LOOK_INTERVAL_S)
                    silent_s = time.monotonic() - asked_s
                    self._judge(router, silent_s, "the instance does not answer", order=False)
                pulse = question.result()
            except AegaeonError as error:
                if not self.instance.alive():
                    return  # which somebody else waits for
                logger.warning("the instance does not tell its pulse: %s", error)
                await asyncio.sleep(PULSE_INTERVAL_S)
                continue
            finally:
                question.cancel()
            doing = f"the step loop does not get on while {pulse['doing']}"
            self._judge(router, pulse["stuck_s"], doing, order=pulse["order"])
            await asyncio.sleep(PULSE_INTERVAL_S)

    def _judge(self, router: Router, stuck_s: float, what: str, *, order: bool) -> None:
        rules = self._pool.supervision
        # An order may be long, such as a load from a slow disk, and still is no accident.
        stalled_after = rules.restart_after if order else rules.stalled_after
        if stalled_after is None or stuck_s < stalled_after:
            if self._stalled:
                logger.info("the instance gets on again")
            self._stalled = False
            router.report_stalled(None)
            return
        message = f"{what}, for {stuck_s:.1f} s"
        if not self._stalled:
            logger.error("%s", message)
        self._stalled = True
        router.report_stalled(Unavailable("instance_stalled", message, retry_after_s=1))
        if rules.restart_after is not None and stuck_s >= rules.restart_after:
            logger.error("%s: it is killed", message)
            self.instance.kill()
