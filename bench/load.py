"""A closed loop of streaming completions over HTTP, and what a client sees of them."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Answer:
    """One request's tokens; seconds from sending it to the first and to the last."""

    token_ids: list[int]
    ttft_s: float
    total_s: float


@dataclass(frozen=True)
class Load:
    """What one run of the loop did."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds


def prompts(count: int, *, seed: int = 0) -> list[str]:
    """Texts of about 60 tokens that differ from the first word on."""
    topics = ("bees", "bridges", "bread", "maps", "rain", "ships", "clocks", "glass")
    return [
        f"{seed}-{index} {topics[index % len(topics)]}: please write a short story about a ship "
        f"that sails around the world and finds an island where it always rains, and explain "
        f"{topics[(index + 3) % len(topics)]} to a child in three sentences."
        for index in range(count)
    ]


def run_load(
    address: str, model: str, texts: Sequence[str], *, concurrency: int, max_tokens: int
) -> Load:
    """Send `texts`, always `concurrency` of them open, each for exactly `max_tokens` tokens."""
    return asyncio.run(_run(address, model, texts, concurrency, max_tokens))


async def _run(
    address: str, model: str, texts: Sequence[str], concurrency: int, max_tokens: int
) -> Load:
    answers: list[Answer | None] = [None] * len(texts)
    waiting = iter(enumerate(texts))

    async def user(client: httpx.AsyncClient) -> None:
        for index, text in waiting:
            answers[index] = await _complete(client, model, text, max_tokens)

    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        started = time.perf_counter()
        await asyncio.gather(*(user(client) for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    return Load([answer for answer in answers if answer is not None], seconds)


async def _complete(client: httpx.AsyncClient, model: str, text: str, max_tokens: int) -> Answer:
    body = {
        "model": model,
        "prompt": text,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    token_ids: list[int] = []
    ttft = 0.0
    sent = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            for choice in json.loads(data)["choices"]:
                new = choice.get("token_ids") or []
                if new and not token_ids:
                    ttft = time.perf_counter() - sent
                token_ids += new
    assert len(token_ids) == max_tokens
    return Answer(token_ids, ttft, time.perf_counter() - sent)
