"""One vLLM engine core per model, all in one process, stepped by our loop instead of its own.

vLLM's sockets and their threads, its scheduler and its request handling are used as they are; only
the handshake (our sockets are agreed on beforehand), the busy loop and the shutdown are replaced.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypedDict

import msgspec
import zmq
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType, UtilityOutput
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor

import aegaeon_kernels as ak
from aegaeon.core.clock import Clock
from aegaeon.core.engine import EngineLoad, EngineRequest
from aegaeon.core.errors import AegaeonError
from aegaeon.core.slo import objective_ms
from aegaeon.core.threads import ClosableQueue, QueueClosed
from aegaeon.sched.meter import Meter
from aegaeon.switching.residency import KVUnit
from aegaeon.switching.switcher import Switcher
from aegaeon.vllm_plugin.seam import Seam, Tier, Upstream
from aegaeon.vllm_plugin.seams.kv_blocks import EngineBlocks

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_MS = 5000
# Control calls that touch no device memory; any other makes the model resident first.
_CALLS_WITHOUT_DEVICE = frozenset(
    {"get_supported_tasks", "reset_prefix_cache", "is_sleeping", "is_scheduler_paused"}
)

# Reasons to finish that are no answer: the engine gave up on the request.
_FAULTS = frozenset({"error", "abort"})


class HostedEngineCore(EngineCoreProc):
    """A vLLM engine core that implements `aegaeon.core.engine.Engine`.

    addresses: `input_address` and `output_address`, where the front's client listens.
    wake: set whenever a message has arrived.
    meter: told what the requests get, and when.
    Built inside `hosting`; raises what vLLM raises when it cannot load the model.
    """

    def __init__(
        self,
        name: str,
        vllm_config: VllmConfig,
        *,
        addresses: Mapping[str, str],
        switcher: Switcher,
        wake: threading.Event,
        meter: Meter,
        clock: Clock,
    ) -> None:
        self._name = name
        self._meter = meter
        self._clock = clock
        self._wake = wake
        self._switcher = switcher
        # A second client, of our own, has one message to send: that the core is closed.
        self._close_address = addresses["input_address"] + ".close"
        self._agreed_addresses = EngineZmqAddresses(
            inputs=[addresses["input_address"], self._close_address],
            outputs=[addresses["output_address"]],
        )
        super().__init__(
            vllm_config, True, "", Executor.get_class(vllm_config), True, engine_index=0
        )
        self.process_input_queue_block = False
        self._vllm_step: Any = self.step_fn
        self.step_fn: Any = self._measured_step
        keep_books(switcher, name, self)

    # -- Engine ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    def poll(self) -> None:
        self._process_input_queue()

    def load(self) -> EngineLoad:
        return engine_load(self.scheduler)

    def requests(self) -> Iterable[EngineRequest]:
        return engine_requests(self.scheduler)

    def run_step(self) -> bool:
        return self._process_engine_step()

    def fail(self, error: BaseException) -> None:
        self._meter.failed()
        self._switcher.abandon(self._name)
        self._send_engine_dead()

    def close(self) -> None:
        """End the socket threads, which keep the core and with it the model. It has no requests and
        is not stepped any more. Its client hears nothing of it, and is closed afterwards.
        """
        self._output_queue.close()
        self._input_queue.close()
        with suppress(zmq.Again), zmq.Context() as context:
            socket = context.socket(zmq.ROUTER)
            with socket:
                socket.setsockopt(zmq.RCVTIMEO, _CLOSE_TIMEOUT_MS)
                socket.bind(self._close_address)
                identity, _ = socket.recv_multipart()  # its greeting, as it sends to each client
                socket.send_multipart(
                    [identity, EngineCoreRequestType.ABORT.value, msgspec.msgpack.encode([])]
                )
        for thread in (self._input_thread, self.output_thread):
            thread.join(timeout=_CLOSE_TIMEOUT_MS / 1e3)
            if thread.is_alive():
                logger.warning("a socket thread of the model %s does not end", self._name)
        self.shutdown()

    # -- what is replaced of EngineCoreProc ------------------------------------------------

    @property
    def input_queue(self) -> ClosableQueue:
        return self._input_queue

    @input_queue.setter
    def input_queue(self, _created: object) -> None:
        self._input_queue = ClosableQueue(self._wake)

    @property
    def output_queue(self) -> ClosableQueue:
        return self._output_queue

    @output_queue.setter
    def output_queue(self, _created: object) -> None:
        self._output_queue = ClosableQueue()

    def process_input_sockets(self, *args: Any, **kwargs: Any) -> None:
        self._input_thread = threading.current_thread()
        with suppress(QueueClosed):
            super().process_input_sockets(*args, **kwargs)

    def process_output_sockets(self, *args: Any, **kwargs: Any) -> None:
        with suppress(QueueClosed):
            super().process_output_sockets(*args, **kwargs)

    @contextmanager
    def _perform_handshakes(self, *args: Any, **kwargs: Any) -> Iterator[EngineZmqAddresses]:
        yield self._agreed_addresses

    def _measured_step(self) -> Any:
        outputs, executed = self._vllm_step()
        now = self._clock.now()
        for each in (outputs or {}).values():
            for output in each.outputs:
                answers = len(output.new_token_ids) or int(output.pooling_output is not None)
                self._meter.produced(output.request_id, answers, now)
                if output.finish_reason is None:
                    continue
                if str(output.finish_reason) in _FAULTS:
                    self._meter.broken(output.request_id)
                else:
                    self._meter.finished(output.request_id)
        return outputs, executed

    def _measure(self, request_type: EngineCoreRequestType, request: Any) -> None:
        now = self._clock.now()
        if request_type == EngineCoreRequestType.ADD:
            added, _ = request
            # vLLM notes the arrival by the wall clock, in the process that took the request in.
            age_s = max(0.0, time.time() - added.arrival_time)
            own = own_objectives(added)
            self._meter.arrived(added.request_id, now - age_s, **own)
        elif request_type == EngineCoreRequestType.ABORT:
            for request_id in request:
                self._meter.stopped(request_id, now)

    def _handle_client_request(self, request_type: EngineCoreRequestType, request: Any) -> None:
        if request_type == EngineCoreRequestType.UTILITY:
            client_index, call_id, method, _ = request
            if method not in _CALLS_WITHOUT_DEVICE:
                try:
                    self._switcher.activate(self._name)
                except (AegaeonError, ak.Error) as error:
                    # The caller gets the error; the model is as it was.
                    failure = UtilityOutput(call_id, failure_message=str(error))
                    self.output_queue.put_nowait(
                        (client_index, EngineCoreOutputs(utility_output=failure))
                    )
                    return
        self._measure(request_type, request)
        super()._handle_client_request(request_type, request)

    def shutdown(self) -> None:
        """Release what is this core's alone.

        vLLM's own shutdown also tears down process groups, workspaces and caches that the other
        cores of this process still use; the process's end does that for all of them.
        """
        self.structured_output_manager.clear_backend()
        self.scheduler.shutdown()


def engine_load(scheduler: Any) -> EngineLoad:
    """Requests that the scheduler would run; none of those that a pause holds back."""
    unfinished = scheduler.get_num_unfinished_requests()
    running = min(scheduler.get_request_counts()[0], unfinished)
    return EngineLoad(num_running=running, num_waiting=unfinished - running)


def engine_requests(scheduler: Any) -> Iterable[EngineRequest]:
    """The scheduler's open requests in order of arrival."""
    now = time.time()  # vLLM notes the arrival by the wall clock, in the process that took it in
    for request in scheduler.requests.values():
        if not request.is_finished():
            yield EngineRequest(
                request.request_id,
                request.num_prompt_tokens,
                request.num_output_tokens,
                # All tokens but the last are computed, which is what a decode step asks for.
                request.num_computed_tokens + 1 >= request.num_tokens
                and request.num_output_tokens > 0,
                request.priority,
                age_s=max(0.0, now - request.arrival_time),
                **own_objectives(request),
            )


class Objectives(TypedDict):
    """A request's own SLO; None: the model's."""

    ttft_ms: float | None
    tpot_ms: float | None


def own_objectives(request: Any) -> Objectives:
    """What a request brought with it."""
    sampling = request.sampling_params  # None of what is pooled
    own = (sampling and sampling.extra_args) or {}
    return {
        "ttft_ms": objective_ms(own.get("slo_ttft_ms")),
        "tpot_ms": objective_ms(own.get("slo_tpot_ms")),
    }


def keep_books(switcher: Switcher, name: str, engine_core: Any) -> None:
    """From now on an eviction of `name` copies out the blocks that `engine_core` still needs, those
    that have been written since the last time.
    """
    executor = engine_core.model_executor
    blocks = EngineBlocks(
        engine_core.scheduler,
        lambda new_ids: executor.collective_rpc("renumber_blocks", args=(new_ids,)),
    )
    for unit in switcher.models[name].units:
        if isinstance(unit, KVUnit):
            _keep_book(unit, blocks, executor)


def _keep_book(unit: KVUnit, blocks: EngineBlocks, executor: Any) -> None:
    unit.book = blocks
    executor.before_step = lambda output: unit.written(blocks.written_by(output))


SEAM = Seam(
    name="engine_core",
    tier=Tier.PRIVATE,
    why="several engine cores must share one process and one device, stepped one at a time",
    how="a subclass of EngineCoreProc without busy loop, with agreed socket addresses, queues that "
    "wake our loop and end their threads when closed, and a shutdown that spares what the cores "
    "share",
    upstream_link="https://github.com/vllm-project/vllm/issues/299",
    remove_when="vLLM hosts several engine cores in one process",
    relies_on=(
        Upstream(
            "vllm.v1.engine.core",
            "EngineCoreProc.__init__",
            (
                "vllm_config",
                "local_client",
                "handshake_address",
                "executor_class",
                "log_stats",
            ),
        ),
        Upstream("vllm.v1.engine.core", "EngineCoreProc._perform_handshakes"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc._process_input_queue"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc._process_engine_step"),
        Upstream(
            "vllm.v1.engine.core",
            "EngineCoreProc._handle_client_request",
            ("request_type", "request"),
        ),
        Upstream("vllm.v1.engine.core", "EngineCoreProc._send_engine_dead"),
        Upstream("vllm.v1.engine.core", "EngineCore.step_fn"),
        Upstream("vllm.v1.engine", "EngineCoreOutputs.outputs"),
        Upstream("vllm.v1.engine", "EngineCoreOutput.request_id"),
        Upstream("vllm.v1.engine", "EngineCoreOutput.new_token_ids"),
        Upstream("vllm.v1.engine", "EngineCoreOutput.pooling_output"),
        Upstream("vllm.v1.engine", "EngineCoreOutput.finish_reason"),
        Upstream("vllm.v1.engine", "FinishReason.__str__", ("self",)),
        Upstream("vllm.v1.engine.core", "EngineCoreProc.has_work"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc.input_queue"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc.output_queue"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc.output_thread"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc.process_input_sockets"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc.process_output_sockets"),
        Upstream("vllm.v1.engine", "EngineCoreRequestType.ABORT"),
        Upstream("vllm.v1.engine.core", "EngineCoreProc.process_input_queue_block"),
        Upstream("vllm.v1.engine.core", "EngineCore.shutdown"),
        Upstream("vllm.v1.core.sched.scheduler", "Scheduler.get_request_counts"),
        Upstream("vllm.v1.core.sched.scheduler", "Scheduler.requests"),
        Upstream("vllm.v1.request", "Request.arrival_time"),
        Upstream("vllm.v1.request", "Request.num_prompt_tokens"),
        Upstream("vllm.v1.request", "Request.num_computed_tokens"),
        Upstream("vllm.v1.request", "Request.num_output_tokens"),
        Upstream("vllm.v1.request", "Request.num_tokens"),
        Upstream("vllm.v1.request", "Request.priority"),
        Upstream("vllm.v1.request", "Request.sampling_params"),
        Upstream("vllm.sampling_params", "SamplingParams.extra_args"),
        Upstream("vllm.v1.request", "Request.is_finished"),
        Upstream("vllm.v1.core.sched.scheduler", "Scheduler.get_num_unfinished_requests"),
        Upstream("vllm.v1.engine.utils", "EngineZmqAddresses.inputs"),
        Upstream(
            "vllm.v1.executor.uniproc_executor",
            "UniProcExecutor.execute_model",
            ("scheduler_output", "non_block"),
        ),
    ),
)
