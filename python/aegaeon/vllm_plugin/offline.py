"""Several models in this very process, without server or sockets: `aegaeon generate`, and tests.

Same workers, same switcher, same step loop as an instance; only vLLM's in-process `LLMEngine`
stands in for the engine core behind sockets.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

import aegaeon_kernels as ak
from aegaeon.core.clock import Clock, MonotonicClock
from aegaeon.core.config import ModelConfig
from aegaeon.core.engine import EngineLoad, EngineRequest
from aegaeon.core.errors import AegaeonError, OrderRefused
from aegaeon.sched.scheduler import Policy
from aegaeon.sched.step_loop import StepLoop
from aegaeon.switching.image_cache import ImageCache
from aegaeon.switching.switcher import Switcher
from aegaeon.vllm_plugin.device_memory import make_switcher
from aegaeon.vllm_plugin.engine_config import engine_config, serve_args
from aegaeon.vllm_plugin.hosting import hosting
from aegaeon.vllm_plugin.request_form import adapter_of, params_of, prompt_of
from aegaeon.vllm_plugin.seams import apply_all
from aegaeon.vllm_plugin.seams.engine_core import engine_load, engine_requests, keep_books

# Taken as blocks are first stored.
DEFAULT_HOST_KV_BYTES = 1 << 30


@dataclass(frozen=True)
class Prompt:
    """One request: a text or token ids for `model`; `sampling`: fields of vLLM's SamplingParams, or
    None: a vector is asked for. image: the file of one. adapter: the directory of a LoRA adapter.
    """

    model: str
    prompt: str | Sequence[int]
    sampling: Mapping[str, Any] | None
    image: str | None = None
    adapter: str | None = None


class OfflineEngine:
    """An in-process vLLM engine that implements `aegaeon.core.engine.Engine`."""

    def __init__(self, name: str, engine: LLMEngine, switcher: Switcher) -> None:
        self._name = name
        self._switcher = switcher
        self.engine = engine
        self.finished: dict[str, RequestOutput] = {}
        self.error: BaseException | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def core(self) -> Any:
        """vLLM's engine core: scheduler, executor, block pool."""
        return self.engine.engine_core.engine_core

    def poll(self) -> None:
        """Requests are added by the caller's thread, between turns."""

    def load(self) -> EngineLoad:
        return engine_load(self.core.scheduler)

    def requests(self) -> Iterable[EngineRequest]:
        return engine_requests(self.core.scheduler)

    def has_work(self) -> bool:
        return self.error is None and self.engine.has_unfinished_requests()

    def run_step(self) -> bool:
        outputs = self.engine.step()
        for output in outputs:
            if output.finished:
                self.finished[output.request_id] = output
        return bool(outputs)

    def fail(self, error: BaseException) -> None:
        self._switcher.abandon(self._name)
        self.error = error


class OfflinePool:
    """Hosts models in this process and generates with all of them at once.

    device: an `aegaeon_kernels.Device`; the models share `device_memory_bytes` of it, rounded
    down to whole pages of the device. KV blocks of models that are not on it share
    `host_kv_memory_bytes` of the host. image_cache: where weights images outlive the process.
    Use as a context manager; `close` gives back all device and host memory.
    """

    def __init__(
        self,
        device: ak.Device,
        *,
        device_memory_bytes: int,
        host_kv_memory_bytes: int = DEFAULT_HOST_KV_BYTES,
        policy: Policy,
        clock: Clock | None = None,
        image_cache: ImageCache | None = None,
    ) -> None:
        apply_all()
        clock = clock or MonotonicClock()
        self._device = device
        self._image_cache = image_cache
        self.switcher = make_switcher(
            device,
            device_memory_bytes=device_memory_bytes,
            host_memory_bytes=None,
            host_kv_memory_bytes=host_kv_memory_bytes,
            clock=clock,
        )
        self.loop = StepLoop(
            policy=policy,
            residency=self.switcher,
            clock=clock,
            recoverable=(AegaeonError, ak.Error),
        )
        self.switcher.is_busy = self.loop.is_busy
        self.engines: dict[str, OfflineEngine] = {}
        self._next_id = 0

    def add_model(self, model: ModelConfig) -> OfflineEngine:
        """Load one more model. Raises ConfigError, ModelLoadError, CapacityError."""
        namespace = serve_args(model, device_kind=self._device.kind)
        config = engine_config(namespace, model=model.name, device_kind=self._device.kind)
        with hosting(self.switcher, model.name, pinned=model.pin, image_cache=self._image_cache):
            engine = LLMEngine(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=False,
                multiprocess_mode=False,
            )
        hosted = OfflineEngine(model.name, engine, self.switcher)
        keep_books(self.switcher, model.name, hosted.core)
        self.engines[model.name] = hosted
        self.loop.add(hosted, slo=model.slo, priority=model.priority)
        return hosted

    def remove_model(self, name: str) -> None:
        """Give back all that a model has: device and host memory, KV cache, address ranges.

        Raises ValueError for an unknown name, OrderRefused while it has open requests.
        """
        engine = self._engine(name)
        if engine.has_work():
            raise OrderRefused(f"the model {name!r} has open requests")
        with suppress(KeyError):  # given up
            self.loop.remove(name)
        del self.engines[name]
        engine.core.scheduler.shutdown()
        self.switcher.remove_model(name)

    def generate(self, prompts: Sequence[Prompt]) -> list[RequestOutput]:
        """Run all prompts, models interleaved by the policy; outputs in the order of `prompts`.

        Raises what a model's engine raised, when one failed.
        """
        ids = [self.submit(prompt) for prompt in prompts]
        self.loop.run_until_idle()
        for engine in self.engines.values():
            if engine.error is not None:
                raise engine.error
        return [
            self.engines[prompt.model].finished.pop(request_id)
            for request_id, prompt in zip(ids, prompts, strict=True)
        ]

    def submit(self, prompt: Prompt) -> str:
        """Add one request; it runs when the loop does. Returns its id."""
        engine = self._engine(prompt.model)
        request_id = f"{prompt.model}-{self._next_id}"
        self._next_id += 1
        request = vars(prompt)
        engine.engine.add_request(
            request_id, prompt_of(request), params_of(request), lora_request=adapter_of(request)
        )
        return request_id

    def _engine(self, name: str) -> OfflineEngine:
        try:
            return self.engines[name]
        except KeyError:
            known = ", ".join(self.engines)
            raise ValueError(f"no model is called {name!r}; there are: {known}") from None

    def close(self) -> None:
        for engine in self.engines.values():
            engine.core.scheduler.shutdown()
        self.switcher.close()

    def __enter__(self) -> "OfflinePool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
