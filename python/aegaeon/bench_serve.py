"""`aegaeon bench serve`: requests at their times against a running server, measured at the client.

Open loop: a request is sent when its time has come, however many are open, and its deadlines count
from that time, so a slow server does not slow its own measurement down. Any server with vLLM's
`/v1/completions`, `/v1/models` and `/tokenize` will do, plain vLLM included.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from aegaeon.core.errors import AegaeonError
from aegaeon.core.slo import TokenDeadlines, TokenRun
from aegaeon.sim.simulator import Request
from aegaeon.sim.workload import Arrivals, Lengths

# Prompts are drawn from its tokens at random: none begins as another, no prefix is cached.
_TEXT = (
    "In the old harbour, between the fish market and the customs house, a clerk counted barrels, "
    "wrote their marks into a ledger and wondered which of the ships would be the next to leave. "
)


@dataclass(frozen=True)
class ServedTarget:
    """A model of the server: its longest prompt plus answer, and what prompts are made of."""

    name: str
    max_model_len: int
    token_ids: tuple[int, ...]


@dataclass
class Outcome:
    """What became of a request. Times in seconds from the start of the run.

    sent_s: when it was really sent; `request.at_s` is when it should have been. status: of HTTP, or
    None without an answer. error: the code or the text of what went wrong; None: it ended well.
    """

    request: Request
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: int | None = None
    error: str | None = None
    runs: list[TokenRun] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(run.count for run in self.runs)

    @property
    def refused(self) -> bool:
        """The server said that it is too busy, at once."""
        return self.status in (429, 503) and not self.runs

    @property
    def ttft_s(self) -> float | None:
        return self.runs[0].first_s - self.request.at_s if self.runs else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for less than two."""
        more = self.num_tokens - 1
        return (self.runs[-1].first_s - self.runs[0].first_s) / more if more > 0 else None


@dataclass(frozen=True)
class Target:
    """Where requests go. send_slo: with the headers by which this project's server schedules."""

    base_url: str
    api_key: str | None = None
    timeout_s: float = 600.0
    send_slo: bool = True

    def client(self) -> httpx.AsyncClient:
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return httpx.AsyncClient(
            base_url=self.base_url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=self.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )


async def served_targets(target: Target, names: Sequence[str]) -> dict[str, ServedTarget]:
    """The models `names`, or all of the server. Raises AegaeonError when one is not there."""
    try:
        async with target.client() as client:
            listing = (await client.get("/v1/models")).raise_for_status().json()["data"]
            cards = {card["id"]: card for card in listing}
            unknown = [name for name in names if name not in cards]
            if unknown:
                raise AegaeonError(
                    f"{target.base_url} does not serve {', '.join(unknown)}; it has: "
                    f"{', '.join(cards)}"
                )
            found = {}
            for name in names or cards:
                asked = {"model": name, "prompt": _TEXT, "add_special_tokens": False}
                answer = (await client.post("/tokenize", json=asked)).raise_for_status().json()
                length = int(cards[name].get("max_model_len") or answer["max_model_len"])
                found[name] = ServedTarget(name, length, tuple(answer["tokens"]))
    except httpx.HTTPError as error:
        raise AegaeonError(f"{target.base_url} cannot be asked for its models: {error}") from error
    return found


def workload(
    rates: Mapping[str, float],
    *,
    arrivals: Arrivals,
    lengths: Lengths,
    duration_s: float,
    seed: int,
) -> list[Request]:
    """Requests of every model at its rate per second, in order of time; the same for one seed."""
    requests = []
    for name, rate in rates.items():
        when, sizes = Random(f"{seed}/{name}"), Random(f"{seed}/{name}/lengths")
        for at_s in arrivals.times(when, rate, duration_s):
            requests.append(Request(at_s, name, *lengths.draw(sizes)))
    return sorted(requests)


def fitted(request: Request, served: ServedTarget) -> Request:
    """The request, shortened to what its model takes: the answer first, then the prompt."""
    output = max(1, min(request.output_tokens, served.max_model_len - 1))
    prompt = max(1, min(request.input_tokens, served.max_model_len - output))
    return Request(request.at_s, request.model, prompt, output)


async def run(
    target: Target,
    requests: Sequence[Request],
    served: Mapping[str, ServedTarget],
    deadlines: Mapping[str, TokenDeadlines],
    *,
    seed: int = 0,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Send all `requests` and wait for all of them; the outcomes in the requests' order."""
    dice = Random(seed)
    prompts = [_prompt(served[each.model], each.input_tokens, dice) for each in requests]
    async with target.client() as client, asyncio.TaskGroup() as group:
        began = time.monotonic()
        tasks = []
        for request, prompt in zip(requests, prompts, strict=True):
            await asyncio.sleep(max(0.0, began + request.at_s - time.monotonic()))
            slo = deadlines[request.model] if target.send_slo else None
            one = _one(client, request, prompt, slo, began, on_end)
            tasks.append(group.create_task(one))
    return [task.result() for task in tasks]


def _prompt(served: ServedTarget, num_tokens: int, dice: Random) -> list[int]:
    return [dice.choice(served.token_ids) for _ in range(num_tokens)]


async def _one(
    client: httpx.AsyncClient,
    request: Request,
    prompt: list[int],
    slo: TokenDeadlines | None,
    began: float,
    on_end: Callable[[Outcome], None],
) -> Outcome:
    outcome = Outcome(request, sent_s=time.monotonic() - began)
    body = {
        "model": request.model,
        "prompt": prompt,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    headers = {}
    if slo is not None:
        headers = {
            "x-slo-ttft-ms": f"{slo.ttft_s * 1e3:g}",
            "x-slo-tpot-ms": f"{slo.tpot_s * 1e3:g}",
        }
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            outcome.status = answer.status_code
            if answer.is_error:
                await answer.aread()
                outcome.error = _error_code(answer)
            else:
                await _read_tokens(answer, outcome, began)
    except httpx.HTTPError as error:
        outcome.error = type(error).__name__
    outcome.ended_s = time.monotonic() - began
    on_end(outcome)
    return outcome


async def _read_tokens(answer: httpx.Response, outcome: Outcome, began: float) -> None:
    num_tokens = 0
    async for chunk in _chunks(answer):
        now = time.monotonic() - began
        if "error" in chunk:
            outcome.error = str(chunk["error"].get("code") or chunk["error"].get("type"))
            return
        usage = chunk.get("usage")
        # Without running counts a chunk with text is taken for one token.
        text = any(choice.get("text") for choice in chunk.get("choices", ()))
        total = num_tokens + text if usage is None else usage["completion_tokens"]
        if total > num_tokens:
            outcome.runs.append(TokenRun(now, 0.0, total - num_tokens))
            num_tokens = total
    if num_tokens < outcome.request.output_tokens:
        outcome.error = "ended early"


async def _chunks(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _error_code(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"status {answer.status_code}"
