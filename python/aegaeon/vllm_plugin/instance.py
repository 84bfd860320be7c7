"""The instance process: hosts every model of the pool on one device and steps them in turn.

Started by the launcher as `python -m aegaeon.vllm_plugin.instance FD`, where FD is its end of the
control channel. It parses no HTTP; requests reach each engine core over vLLM's own sockets. It ends
when it is told to, at once when the launcher is gone, and when its device is lost.
"""

import ctypes
import gc
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aegaeon_kernels as ak
from aegaeon.core import logs
from aegaeon.core.clock import MonotonicClock
from aegaeon.core.config import ModelConfig, Slo
from aegaeon.core.control import Channel, InstanceSpec, answer, failed_answer
from aegaeon.core.errors import (
    AegaeonError,
    ConfigError,
    DeviceLost,
    OrderRefused,
    UnknownModel,
)
from aegaeon.sched.admission import Admission
from aegaeon.sched.meter import Meter
from aegaeon.sched.metrics import LoopCollector
from aegaeon.sched.policies import make_policy
from aegaeon.sched.step_loop import ORDER, StepLoop
from aegaeon.switching.device_check import raise_if_lost
from aegaeon.switching.image_cache import ImageCache
from aegaeon.switching.metrics import SwitchMetrics
from aegaeon.switching.orders import ORDERS, carry_out
from aegaeon.switching.snapshot import describe, records_of
from aegaeon.vllm_plugin.facts import instance_state, timeline

if TYPE_CHECKING:
    from aegaeon.vllm_plugin.seams.engine_core import HostedEngineCore

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class Instance:
    """The models of one pool on one device."""

    def __init__(self, spec: InstanceSpec) -> None:
        # Imported here and below: vLLM takes seconds, and a stop must work before it is there.
        from aegaeon.vllm_plugin.device_memory import make_switcher

        host_bytes = spec.device_memory_bytes if spec.device == "host" else None
        device = ak.Device(spec.device, memory_bytes=host_bytes)
        self.clock = clock = MonotonicClock()
        self._spec = spec
        self._device = device
        self.runtime_dir = spec.runtime_dir
        self._image_cache = None
        if spec.image_cache_directory is not None:
            self._image_cache = ImageCache(
                Path(spec.image_cache_directory), spec.image_cache_max_bytes
            )
        self.switcher = make_switcher(
            device,
            device_memory_bytes=spec.device_memory_bytes,
            host_memory_bytes=spec.host_memory_bytes,
            host_kv_memory_bytes=spec.host_kv_memory_bytes,
            clock=clock,
        )
        self.loop = StepLoop(
            policy=make_policy(spec.policy, quantum=spec.quantum),
            residency=self.switcher,
            clock=clock,
            recoverable=(AegaeonError, ak.Error),
            on_failure=self._gave_up,
        )
        self.switcher.is_busy = self.loop.is_busy
        self._cores: dict[str, HostedEngineCore] = {}
        self._meters: dict[str, Meter] = {}
        self.metrics = SwitchMetrics(self.switcher, LoopCollector(self.loop, self._meters))
        self._admission = Admission(lambda: self.loop.seen)
        self.failures: dict[str, str] = {}
        # Called with a model that is out of service, and why.
        self.report: Callable[[str, str], None] = lambda model, reason: None

    def add_model(self, model: ModelConfig, addresses: Mapping[str, str]) -> None:
        """Load one model; requests for it can then be taken in. On failure nothing is left of it.

        addresses: `input_address` and `output_address` of its sockets.
        Only from the loop's thread, or while the loop is not running.
        """
        from aegaeon.vllm_plugin.engine_config import engine_config, serve_args
        from aegaeon.vllm_plugin.hosting import hosting
        from aegaeon.vllm_plugin.seams.engine_core import HostedEngineCore

        namespace = serve_args(model, device_kind=self._device.kind)
        config = engine_config(namespace, model=model.name, device_kind=self._device.kind)
        meter = Meter(model.slo)
        with hosting(self.switcher, model.name, pinned=model.pin, image_cache=self._image_cache):
            core = HostedEngineCore(
                model.name,
                config,
                addresses=addresses,
                switcher=self.switcher,
                wake=self.loop.wake,
                meter=meter,
                clock=self.clock,
            )
        self._cores[model.name] = core
        self._meters[model.name] = meter
        self.loop.add(core, slo=model.slo, priority=model.priority)
        self.loop.keep_alive.limits_s[model.name] = model.keep_alive

    def remove_model(self, name: str) -> None:
        """Give back all that a model without open requests has. Its client is closed already.

        Only from the loop's thread. Raises UnknownModel, OrderRefused, and what the device raises:
        then the model is out of service, and can be removed again.
        """
        core = self._cores.get(name)
        if core is None:
            if self.failures.pop(name, None) is not None:
                return  # it could not be loaded: there is nothing of it
            raise UnknownModel(f"the model {name!r} does not exist")
        if name not in self.failures:  # else its requests have ended with an error
            core.poll()
            if core.load().num_unfinished:
                raise OrderRefused(f"the model {name!r} has open requests")
        with suppress(KeyError):  # given up before
            self.loop.remove(name)
        self.switcher.abandon(name)
        self.switcher.remove_model(name)
        core.close()
        del self._cores[name], self._meters[name]
        self.loop.keep_alive.limits_s.pop(name, None)
        self.failures.pop(name, None)

    def quarantine(self, model: str, error: BaseException) -> None:
        """Count `model` as out of service for good. The others go on."""
        self.failures[model] = reason = f"{type(error).__name__}: {error}"
        self.report(model, reason)

    def _gave_up(self, model: str, error: BaseException) -> None:
        self.quarantine(model, error)
        self._look_at_the_device(model, error)

    def _look_at_the_device(self, model: str, error: BaseException) -> None:
        raise_if_lost(self._device, model, error, self.loop.loads())

    def pulse(self) -> dict[str, Any]:
        """Whether the step loop gets on; callable from any thread."""
        progress = self.loop.progress
        doing = progress.doing
        return {"stuck_s": progress.stuck_s(), "doing": doing, "order": doing == ORDER}

    def state(self) -> dict[str, Any]:
        """A snapshot for the admin interface; callable from any thread."""
        return {
            **instance_state(self.switcher, self.loop, self.metrics, self._meters, self.clock),
            "failures": dict(self.failures),
        }

    def timeline(self, since: int = 0) -> dict[str, Any]:
        """Who had the device lately, from slice `since` on; callable from any thread."""
        return timeline(self.loop, since)

    def switch_records(self, since: float | None = None) -> list[dict[str, Any]]:
        """The last switches, oldest first; callable from any thread.

        since: only those that began later, on the clock of `now` in the state.
        """
        return records_of(self.switcher, since)

    def admit(self, model: str, prompt_tokens: int, ttft_ms: float | None) -> float:
        """0.0 when a new request may come, else in how many seconds; ttft_ms: None: the model's.

        Only from the control thread.
        """
        ttft_s = (ttft_ms or self._meters[model].slo.ttft_ms) / 1e3
        return self._admission.late_by_s(
            model, prompt_tokens=prompt_tokens, ttft_s=ttft_s, now=self.clock.now()
        )

    def configure(self, models: Mapping[str, Any]) -> "Future[Any]":
        """Have the step loop go by other settings from now on: name -> `slo`, `priority` and
        `keep_alive` in seconds, None for ever.
        """

        def change() -> None:
            for name, settings in models.items():
                if name not in self._meters:
                    continue  # it could not be loaded
                slo = Slo.model_validate(settings["slo"])
                self._meters[name].slo = slo
                self.loop.configure(name, slo=slo, priority=settings["priority"])
                self.loop.keep_alive.limits_s[name] = settings["keep_alive"]

        return self.loop.between_steps(change)

    def order(self, order: str, model: str) -> "Future[Any]":
        """Have the step loop carry out `order`; takes the model's description afterwards."""
        return self.loop.between_steps(lambda: describe(carry_out(self.switcher, order, model)))

    def order_to_add(self, model: Mapping[str, Any], addresses: Mapping[str, str]) -> "Future[Any]":
        """Have the step loop load one more model; takes its description afterwards.

        model: as in the pool file, complete. The others wait meanwhile.
        """

        def add() -> Any:
            config = ModelConfig.model_validate(model)
            if config.name in self._cores:
                raise OrderRefused(f"a model {config.name!r} is hosted already")
            try:
                self.add_model(config, addresses)
            except ConfigError:
                raise
            except Exception as error:
                # The boundary of a load, as at the start.
                logger.debug(f"model {config.name} cannot be loaded", exc_info=True)
                reason = str(error) or repr(error)
                raise OrderRefused(f"{config.name!r} cannot be loaded: {reason}") from error
            finally:
                gc.collect()  # vLLM's objects refer to each other
            return describe(self.switcher.models[config.name])

        return self.loop.between_steps(add)

    def order_to_remove(self, model: str) -> "Future[Any]":
        """Have the step loop remove a model."""

        def remove() -> None:
            self.remove_model(model)
            gc.collect()

        return self.loop.between_steps(remove)


def run(spec: InstanceSpec, control: Channel) -> int:
    """Load the pool, report each model, then step until told to stop. Returns the exit status."""
    from aegaeon.vllm_plugin.seams import apply_all

    apply_all()
    instance = Instance(spec)
    threading.Thread(
        target=_serve_control, args=(instance, control), name="control", daemon=True
    ).start()
    instance.report = partial(_report_failure, control)
    for model in spec.models:
        try:
            instance.add_model(model, spec.addresses[model.name])
        except Exception as error:
            # The boundary of a load: what vLLM raises ends this model's service, not the pool's.
            logger.debug(f"model {model.name} cannot be loaded", exc_info=True)
            if not isinstance(error, ConfigError) and len(instance.failures) + 1 < len(spec.models):
                instance.quarantine(model.name, error)
                continue
            control.send(
                {
                    "event": "load_failed",
                    "model": model.name,
                    "kind": "config" if isinstance(error, ConfigError) else "load",
                    "own": isinstance(error, AegaeonError | ak.Error),
                    "message": f"{error}" or repr(error),
                }
            )
            return 1
        control.send({"event": "loaded", "model": model.name})
    control.send({"event": "ready"})
    try:
        instance.loop.run()
    except DeviceLost as error:
        control.send({"event": "device_lost", "message": str(error)})
        return 1
    return 0


def _report_failure(control: Channel, model: str, reason: str) -> None:
    with suppress(OSError):  # the launcher is gone: the control thread ends the process
        control.send({"event": "failed", "model": model, "message": reason})


def _serve_control(instance: Instance, control: Channel) -> None:
    """Answer the launcher's questions; when it is gone, end the process."""
    answers: dict[str, Callable[..., Any]] = {
        "pulse": instance.pulse,
        "state": instance.state,
        "switches": instance.switch_records,
        "timeline": instance.timeline,
        "metrics": instance.metrics.exposition,
        "admit": instance.admit,
    }
    orders: dict[str, Callable[..., Future[Any]]] = {
        **{order: partial(instance.order, order) for order in ORDERS},
        "add": instance.order_to_add,
        "remove": instance.order_to_remove,
    }
    try:
        while (message := control.receive()) is not None:
            question, arguments = message["ask"], message.get("with", {})
            if question == "stop":
                instance.loop.stop()
            elif question in orders:
                done = orders[question](**arguments)
                done.add_done_callback(partial(_report, control, message["id"]))
            elif question == "configure":
                done = instance.configure(**arguments)
                done.add_done_callback(partial(_report, control, message["id"]))
            else:
                control.send(_answered(message["id"], answers[question], arguments))
    except OSError:
        pass  # it went away between the question and the answer
    # Nobody else is there to remove it.
    shutil.rmtree(instance.runtime_dir, ignore_errors=True)
    # Not a normal exit: engine cores may be in the middle of a step, which nobody waits for any
    # more. Device memory and sockets are the process's own and go with it.
    os._exit(1)


def _answered(
    number: int, question: Callable[..., Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return answer(number, question(**arguments))
    except Exception as error:
        # It is the asker's: without this thread nobody could stop the process.
        logger.debug("a question of the launcher cannot be answered", exc_info=True)
        return failed_answer(number, error)


def _report(control: Channel, number: int, done: "Future[Any]") -> None:
    if done.cancelled():  # the process ends, which is answer enough
        return
    error = done.exception()
    with suppress(OSError):  # the launcher is gone: the control thread ends the process
        control.send(
            answer(number, done.result()) if error is None else failed_answer(number, error)
        )


def _go_on_when_the_launcher_ends() -> None:
    """Have the kernel continue this process if it is stopped while the launcher ends.

    Else nobody would: a stopped process does not see that the other end of the channel is closed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0) != 0:
        logger.warning("prctl(PR_SET_PDEATHSIG): %s", os.strerror(ctypes.get_errno()))


def main(control_fd: int) -> None:
    # Ctrl-C reaches the whole terminal, and a service manager signals the whole group; the launcher
    # decides, and tells this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _go_on_when_the_launcher_ends()
    os.set_inheritable(control_fd, False)
    logs.configure()
    control = Channel(Connection(control_fd))
    message = control.receive()
    if message is None:
        return
    status = run(InstanceSpec.from_message(message), control)
    # vLLM's socket threads are daemons with open sockets; there is nothing left to flush.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
