"""An instance without vLLM (real switcher, step loop and meters; engines made of arithmetic), and
its admin listener on a real unix socket.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from switcher_support import KV, WEIGHTS, make_switcher

from aegaeon.core.clock import MonotonicClock
from aegaeon.core.config import Slo
from aegaeon.core.engine import EngineLoad, EngineRequest
from aegaeon.sched.meter import Meter
from aegaeon.sched.metrics import LoopCollector
from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.sched.step_loop import StepLoop
from aegaeon.server.admin import admin_app
from aegaeon.switching.metrics import SwitchMetrics
from aegaeon.switching.orders import ORDERS, carry_out
from aegaeon.switching.snapshot import describe, records_of
from aegaeon.vllm_plugin.facts import instance_state, timeline

REFUSED = [{"model": "b", "reason": "deadline_cannot_be_met", "count": 7}]


class MeteredEngine:
    """Each step gives one token to the one request that is open."""

    def __init__(self, name: str, meter: Meter, clock: MonotonicClock) -> None:
        self.name, self._meter, self._clock = name, meter, clock
        self.left = self.asked = 0

    def ask(self, num_tokens: int) -> None:
        self.left = self.asked = num_tokens
        self._meter.arrived("r", self._clock.now())

    def poll(self) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad(num_running=int(self.left > 0), num_waiting=0)

    def requests(self) -> list[EngineRequest]:
        done = self.asked - self.left
        return [EngineRequest("r", 1, done, done > 0)] if self.left else []

    def has_work(self) -> bool:
        return self.left > 0

    def run_step(self) -> bool:
        time.sleep(0.001)
        self._meter.produced("r", 1, self._clock.now())
        self.left -= 1
        if not self.left:
            self._meter.finished("r")
        return True

    def fail(self, error: BaseException) -> None:
        raise error


class SmallInstance:
    """Models a, b and c on a device that holds one of them."""

    def __init__(self) -> None:
        self.clock = MonotonicClock()
        self.switcher, _ = make_switcher(capacity=WEIGHTS + KV)
        self.meters = {name: Meter(Slo(ttft_ms=60_000, tpot_ms=60_000)) for name in "abc"}
        self.loop = StepLoop(policy=RoundRobin(2), residency=self.switcher, clock=self.clock)
        self.metrics = SwitchMetrics(self.switcher, LoopCollector(self.loop, self.meters))
        self.engines = {
            name: MeteredEngine(name, meter, self.clock) for name, meter in self.meters.items()
        }
        for engine in self.engines.values():
            self.loop.add(engine)

    def work(self, **num_tokens: int) -> None:
        """Serve one request each, to the end: work(a=4, b=4)."""
        for name, count in num_tokens.items():
            self.engines[name].ask(count)
        self.loop.run_until_idle()

    def state(self) -> dict[str, Any]:
        return instance_state(self.switcher, self.loop, self.metrics, self.meters, self.clock)

    def snapshot(self) -> dict[str, Any]:
        """As `/admin/events?with=timeline` sends it."""
        front = {"open": dict.fromkeys(self.meters, 0), "refused": REFUSED}
        return {"state": {**self.state(), "front": front}, "timeline": timeline(self.loop)}

    async def ask(self, question: str, *, timeout_s: float | None = 5.0, **arguments: Any) -> Any:
        if question in ORDERS:
            return describe(carry_out(self.switcher, question, arguments["model"]))
        if question == "switches":
            return records_of(self.switcher, **arguments)
        if question == "timeline":
            return timeline(self.loop, **arguments)
        return self.state()

    def app(self, closing: asyncio.Event | None = None) -> Any:
        return admin_app(self.ask, lambda: self.snapshot()["state"]["front"], closing=closing)


@contextmanager
def listening(app: Any, path: Path) -> Iterator[None]:
    """Serve `app` on the unix socket `path` for as long as the block runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        with _served(app, listener):
            yield
    path.unlink(missing_ok=True)


@contextmanager
def listening_on_loopback(app: Any) -> Iterator[int]:
    """Serve `app` on a free port of 127.0.0.1, which is given, for as long as the block runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with _served(app, listener):
            yield listener.getsockname()[1]


@contextmanager
def _served(app: Any, listener: socket.socket) -> Iterator[None]:
    listener.listen()
    config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)

    async def serve() -> None:
        await server.serve(sockets=[listener])
        await asyncio.sleep(0.05)  # what was cut off is closed on the loop

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=10)
    assert not thread.is_alive()
