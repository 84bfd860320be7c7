"""How many requests meet their deadlines, under Poisson load on all models at once?

A request is good when its first token came within the TTFT, and every later one within the TPOT
after it, on average. Three servers, one after another, with the same checkpoints and the same
arrivals: ours with each of its policies, on a device that holds the largest model beside the
smallest; and vLLM with one server per model in sleep mode, behind a router that lets one model be
awake, finishes its open requests, then puts it to sleep and wakes the next (`vllm sleep`). On a CPU
vLLM cannot sleep: there only ours runs.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import yaml
from load import prompts
from scale import Result, Scale
from servers import Server, vllm_server

from aegaeon.core import envs
from aegaeon.local_server import local_server

POLICIES = ("round-robin", "slack", "paper", "request-level", "fcfs")


@dataclass(frozen=True)
class Arrival:
    at_s: float
    model: str
    prompt: str


@dataclass
class Outcome:
    """Seconds from the arrival to each token; `error` when there is none."""

    tokens_s: list[float] = field(default_factory=list)
    error: str | None = None

    def is_good(self, scale: Scale) -> bool:
        if self.error is not None or not self.tokens_s:
            return False
        later = self.tokens_s[-1] - self.tokens_s[0]
        in_time = later <= (len(self.tokens_s) - 1) * scale.tpot_ms / 1e3
        return self.tokens_s[0] <= scale.ttft_ms / 1e3 and in_time


def arrivals(scale: Scale, rate: float) -> list[Arrival]:
    """The same for every server: of each model `rate` a second, at random."""
    found = []
    for index, name in enumerate(scale.models):
        rng = random.Random(index)
        at = rng.expovariate(rate)
        while at < scale.load_s:
            found.append((at, name))
            at += rng.expovariate(rate)
    texts = prompts(len(found))
    return [Arrival(at, name, text) for (at, name), text in zip(sorted(found), texts, strict=True)]


def measure_goodput(scale: Scale) -> Iterator[Result]:
    for rate in scale.rates:
        load = arrivals(scale, rate)
        for policy in POLICIES if scale.is_gpu else POLICIES[:2]:
            yield {**_ours(scale, load, policy), "rate_per_model": rate}
        if scale.is_gpu:
            yield {**_sleeping(scale, load), "rate_per_model": rate}
        else:
            yield {"result": "goodput, vllm sleep", "skipped": "vLLM cannot sleep on a CPU"}


def _ours(scale: Scale, load: list[Arrival], policy: str) -> Result:
    with TemporaryDirectory() as folder:
        pool = {
            "device": scale.device,
            "device_memory": scale.room_for_largest + min(map(scale.room_for, scale.models)),
            "defaults": {
                "kv_memory": scale.kv_memory,
                "max_model_len": scale.max_model_len,
                "slo": {"ttft_ms": scale.ttft_ms, "tpot_ms": scale.tpot_ms},
            },
            "models": [
                {"model": str(path), "name": name, "vllm": scale.engine}
                for name, path in scale.models.items()
            ],
            "scheduler": {"policy": policy},
            "admin": {"socket": f"{folder}/admin.sock"},
        }
        file = Path(folder) / "pool.yaml"
        file.write_text(yaml.safe_dump(pool))
        envs.set_vllm_defaults()
        with local_server(file, log=Path(folder) / "log") as server:
            addresses = dict.fromkeys(scale.models, server.address)
            outcomes = asyncio.run(_play(scale, load, addresses, None))
    return _summary(f"goodput, aegaeon, {policy}", scale, outcomes)


def _sleeping(scale: Scale, load: list[Arrival]) -> Result:
    with TemporaryDirectory() as folder, ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, path in scale.models.items():
            servers[name] = stack.enter_context(
                vllm_server(
                    name,
                    path,
                    Path(folder) / name,
                    "--enable-sleep-mode",
                    plain_weights=False,
                    kv_memory=scale.kv_memory,
                    max_model_len=scale.max_model_len,
                    eager=not scale.is_gpu,
                    environment={"VLLM_SERVER_DEV_MODE": "1"},
                )
            )
            httpx.post(f"{servers[name].address}/sleep?level=1", timeout=600).raise_for_status()
        addresses = {name: server.address for name, server in servers.items()}
        outcomes = asyncio.run(_play(scale, load, addresses, SwappingRouter(addresses)))
    return _summary("goodput, vllm sleep", scale, outcomes)


class SwappingRouter:
    """One model is awake; the next one is whose request has waited longest."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._addresses = addresses
        self._awake: str | None = None
        self._open = 0
        self._turn = asyncio.Condition()
        self._queue: list[str] = []

    @asynccontextmanager
    async def turn(self, client: httpx.AsyncClient, model: str) -> AsyncIterator[None]:
        async with self._turn:
            self._queue.append(model)
            # Whoever waits for another model keeps later requests of this one out, or it starves.
            await self._turn.wait_for(
                lambda: (
                    (model == self._awake and self._is_first(model))
                    or (self._open == 0 and self._queue[0] == model)
                )
            )
            self._queue.remove(model)
            if model != self._awake:
                if self._awake is not None:
                    await self._order(client, self._awake, "sleep?level=1")
                await self._order(client, model, "wake_up")
                self._awake = model
            self._open += 1
            self._turn.notify_all()
        try:
            yield
        finally:
            async with self._turn:
                self._open -= 1
                self._turn.notify_all()

    def _is_first(self, model: str) -> bool:
        return all(waiting == model for waiting in self._queue[: self._queue.index(model)])

    async def _order(self, client: httpx.AsyncClient, model: str, order: str) -> None:
        answer = await client.post(f"{self._addresses[model]}/{order}")
        answer.raise_for_status()


async def _play(
    scale: Scale, load: list[Arrival], addresses: dict[str, str], router: SwappingRouter | None
) -> list[Outcome]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        began = time.perf_counter()

        async def one(arrival: Arrival) -> Outcome:
            await asyncio.sleep(max(0.0, arrival.at_s - (time.perf_counter() - began)))
            outcome = Outcome()
            try:
                if router is None:
                    await _complete(client, scale, addresses, arrival, began, outcome)
                else:
                    async with router.turn(client, arrival.model):
                        await _complete(client, scale, addresses, arrival, began, outcome)
            except httpx.HTTPError as error:
                outcome.error = repr(error)
            return outcome

        return await asyncio.gather(*(one(arrival) for arrival in load))


async def _complete(
    client: httpx.AsyncClient,
    scale: Scale,
    addresses: dict[str, str],
    arrival: Arrival,
    began: float,
    outcome: Outcome,
) -> None:
    body = {
        "model": arrival.model,
        "prompt": arrival.prompt,
        "max_tokens": scale.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    address = addresses[arrival.model]
    async with client.stream("POST", f"{address}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            outcome.error = f"status {answer.status_code}"
            return
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[len("data: ") :])["choices"]:
                outcome.tokens_s.append(time.perf_counter() - began - arrival.at_s)


def _summary(name: str, scale: Scale, outcomes: list[Outcome]) -> Result:
    good = sum(outcome.is_good(scale) for outcome in outcomes)
    return {
        "result": name,
        "requests": len(outcomes),
        "good_share": good / max(1, len(outcomes)),
        "good_per_s": good / scale.load_s,
        "errors": sum(outcome.error is not None for outcome in outcomes),
        "ttft_ms_allowed": scale.ttft_ms,
        "tpot_ms_allowed": scale.tpot_ms,
    }
