"""`aegaeon demo`: tiny random models through the whole stack, with a report and a verdict.

Writes checkpoints, runs each model alone on plain vLLM, then serves all of them with a device
memory that cannot hold them together, under concurrent streaming requests from the official client.
The verdict is true only when every token is the one that plain vLLM produced.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console

from aegaeon import checkpoint
from aegaeon.core.config import format_bytes
from aegaeon.demo_report import print_report
from aegaeon.local_server import LocalServer, local_server
from aegaeon.tiny_model import write_tiny_model
from aegaeon.vllm_plugin.plain import run_alone

ARCHITECTURES = ("llama", "qwen3", "gemma", "qwen3_moe", "qwen2", "gemma3")
KV_MEMORY_BYTES = 16 << 20
MAX_MODEL_LEN = 512
# Of what all models need together; some fit beside each other, never all.
DEVICE_SHARE = 0.7
SAMPLE_PERIOD_S = 0.05


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does."""

    models: int = 3
    requests: int = 6
    concurrency: int = 4
    max_tokens: int = 48
    quantum: int = 4


@dataclass(frozen=True)
class Request:
    """One chat request; sampling fields are named as in the API and in vLLM."""

    messages: list[dict[str, str]]
    sampling: dict[str, Any]


@dataclass
class Answer:
    """What came back for one request, and when. Times in seconds since it was sent."""

    token_ids: list[int]
    ttft_s: float
    total_s: float


@dataclass
class ModelReport:
    """One model's share of the run."""

    name: str
    weight_bytes: int
    answers: list[Answer]
    expected: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def num_different(self) -> int:
        return sum(
            answer.token_ids != expected
            for answer, expected in zip(self.answers, self.expected, strict=True)
        )


@dataclass
class DemoReport:
    """Everything the report shows."""

    device_memory_bytes: int
    kv_memory_bytes: int
    models: list[ModelReport]
    state: dict[str, Any] = field(default_factory=dict)
    switches: list[dict[str, Any]] = field(default_factory=list)
    occupancy: list[tuple[float, str | None, dict[str, int]]] = field(default_factory=list)
    serve_s: float = 0.0
    start_s: float = 0.0
    stop_s: float = 0.0

    @property
    def exact(self) -> bool:
        return all(model.num_different == 0 for model in self.models)


def run_demo(settings: DemoSettings, *, workdir: Path | None, as_json: bool) -> bool:
    """Run everything, print the report, and return the verdict.

    workdir: where models, pool file and server log are kept; None: a temporary folder.
    """
    console = Console(stderr=as_json)
    with _folder(workdir) as folder:
        report = _run(settings, folder, console)
    if as_json:
        print(json.dumps({"exact": report.exact, **asdict(report)}))
    else:
        print_report(report, console)
    return report.exact


def _run(settings: DemoSettings, folder: Path, console: Console) -> DemoReport:
    archs = ARCHITECTURES[: settings.models]
    paths = {}
    with console.status("writing tiny models"):
        for index, arch in enumerate(archs):
            paths[arch] = write_tiny_model(arch, folder / arch, seed=index, overwrite=True)
    weights = {name: checkpoint.weight_bytes(name, path) for name, path in paths.items()}
    together = sum(weights.values()) + len(weights) * KV_MEMORY_BYTES
    device_memory = int(DEVICE_SHARE * together)
    sizes = ", ".join(format_bytes(size) for size in weights.values())
    console.print(
        f"{len(archs)} models of {sizes} with {format_bytes(KV_MEMORY_BYTES)} of KV cache each: "
        f"{format_bytes(together)} together, on a device of {format_bytes(device_memory)}"
    )
    requests = {name: _requests(name, settings) for name in archs}
    with console.status("plain vLLM: each model alone"):
        expected = _alone(paths, requests)
    console.print("plain vLLM has answered all requests, one model at a time")
    pool_file = _write_pool(folder, paths, device_memory, settings)
    report = DemoReport(
        device_memory_bytes=device_memory,
        kv_memory_bytes=KV_MEMORY_BYTES,
        models=[],
    )
    with local_server(pool_file, log=folder / "server.log") as server:
        report.start_s = server.start_s
        started = time.monotonic()
        with console.status("the same requests, all models at once"):
            answers = asyncio.run(_serve_all(server, requests, settings, report))
        report.serve_s = time.monotonic() - started
        report.state = server.admin("/admin/state")
        report.switches = server.admin("/admin/switches")
    report.stop_s = server.stop_s
    report.models = [
        ModelReport(name, weights[name], answers[name], expected[name]) for name in archs
    ]
    return report


# -- the work ------------------------------------------------------------------------------------

_TOPICS = (
    "the harbour at night",
    "why bread rises",
    "a short history of maps",
    "how bees find their way home",
    "the sound of rain on a tin roof",
    "what a lighthouse keeper writes",
)


def _requests(name: str, settings: DemoSettings) -> list[Request]:
    """Half greedy, half sampled with a seed; every second one shares a long beginning."""
    shared = "You answer in the style of an old encyclopedia. " * 6
    made = []
    for index in range(settings.requests):
        topic = _TOPICS[index % len(_TOPICS)]
        text = f"{shared if index % 2 else ''}Number {index}: tell {name} about {topic}."
        sampling: dict[str, Any] = {
            "temperature": 0.0 if index % 2 == 0 else 0.8,
            "seed": 1000 + index,
            "max_tokens": settings.max_tokens - index % 3,
            "ignore_eos": True,
        }
        made.append(Request([{"role": "user", "content": text}], sampling))
    return made


def _alone(
    paths: Mapping[str, Path], requests: Mapping[str, Sequence[Request]]
) -> dict[str, list[list[int]]]:
    """The token ids that plain vLLM answers, with one model at a time."""
    jobs = [
        {
            "model": str(path),
            "max_model_len": MAX_MODEL_LEN,
            "kv_memory": KV_MEMORY_BYTES,
            "requests": [asdict(request) for request in requests[name]],
        }
        for name, path in paths.items()
    ]
    answers = run_alone(jobs)
    return {name: answer["token_ids"] for name, answer in zip(paths, answers, strict=True)}


async def _serve_all(
    server: LocalServer,
    requests: Mapping[str, Sequence[Request]],
    settings: DemoSettings,
    report: DemoReport,
) -> dict[str, list[Answer]]:
    """All requests of all models, `concurrency` open per model, while the occupancy is sampled."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    sampler = asyncio.create_task(_sample_occupancy(server, report))
    try:
        per_model = await asyncio.gather(
            *(_serve_one(client, name, wanted, settings) for name, wanted in requests.items())
        )
    finally:
        sampler.cancel()
        await client.close()
    return dict(zip(requests, per_model, strict=True))


async def _serve_one(
    client: Any, name: str, requests: Sequence[Request], settings: DemoSettings
) -> list[Answer]:
    gate = asyncio.Semaphore(settings.concurrency)

    async def one(request: Request) -> Answer:
        async with gate:
            return await _stream(client, name, request)

    return list(await asyncio.gather(*(one(request) for request in requests)))


async def _stream(client: Any, name: str, request: Request) -> Answer:
    sent = time.monotonic()
    extra = {"ignore_eos": request.sampling["ignore_eos"], "return_token_ids": True}
    stream = await client.chat.completions.create(
        model=name,
        messages=request.messages,
        temperature=request.sampling["temperature"],
        seed=request.sampling["seed"],
        max_tokens=request.sampling["max_tokens"],
        stream=True,
        extra_body=extra,
    )
    token_ids: list[int] = []
    ttft = 0.0
    async for chunk in stream:
        for choice in chunk.choices:
            new = (choice.model_extra or {}).get("token_ids") or []
            if new and not token_ids:
                ttft = time.monotonic() - sent
            token_ids += new
    return Answer(token_ids=token_ids, ttft_s=ttft, total_s=time.monotonic() - sent)


async def _sample_occupancy(server: LocalServer, report: DemoReport) -> None:
    started = time.monotonic()
    transport = httpx.AsyncHTTPTransport(uds=str(server.admin_socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        while True:
            state = (await client.get("/admin/state")).json()
            held: dict[str, int] = {}
            for entry in state["arena"]["held"]:
                held[entry["owner"]] = held.get(entry["owner"], 0) + entry["bytes"]
            report.occupancy.append((time.monotonic() - started, state["current"], held))
            await asyncio.sleep(SAMPLE_PERIOD_S)


def _write_pool(
    folder: Path, paths: Mapping[str, Path], device_memory: int, settings: DemoSettings
) -> Path:
    pool = {
        "device": "host",
        "device_memory": device_memory,
        "defaults": {"kv_memory": KV_MEMORY_BYTES, "max_model_len": MAX_MODEL_LEN},
        "models": [{"model": str(path.absolute()), "name": name} for name, path in paths.items()],
        "scheduler": {"policy": "round-robin", "quantum": settings.quantum},
        "admin": {"socket": str(folder.absolute() / "admin.sock")},
    }
    file = folder / "pool.yaml"
    file.write_text(yaml.safe_dump(pool, sort_keys=False))
    return file


@contextmanager
def _folder(workdir: Path | None) -> Iterator[Path]:
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="aegaeon-demo-") as name:
        yield Path(name)
