"""`aegaeon demo`: tiny random models through the whole stack, with a report and a verdict.

Writes checkpoints, runs each model alone on plain vLLM, then serves all of them with a device
memory that cannot hold them together, under concurrent streaming requests from the official client.
The verdict is true only when every token is the one that plain vLLM produced.
"""

import asyncio
import json
import signal
import subprocess
import sys
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
from aegaeon.core import envs
from aegaeon.core.config import format_bytes
from aegaeon.core.errors import AegaeonError
from aegaeon.demo_report import print_report
from aegaeon.tiny_model import write_tiny_model

ARCHITECTURES = ("llama", "qwen3", "gemma", "qwen3_moe", "qwen2", "gemma3")
KV_MEMORY_BYTES = 16 << 20
MAX_MODEL_LEN = 512
# Beside the largest model and its KV cache; too little for a second model.
SPARE_BYTES = 4 << 20
START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 5.0
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
    device_memory = max(weights.values()) + KV_MEMORY_BYTES + SPARE_BYTES
    together = sum(weights.values()) + len(weights) * KV_MEMORY_BYTES
    sizes = ", ".join(format_bytes(size) for size in weights.values())
    console.print(
        f"{len(archs)} models of {sizes} with {format_bytes(KV_MEMORY_BYTES)} of KV cache each: "
        f"{format_bytes(together)} together, on a device of {format_bytes(device_memory)}"
    )
    requests = {name: _requests(name, settings) for name in archs}
    expected = {}
    for name, path in paths.items():
        with console.status(f"plain vLLM: {name} alone"):
            expected[name] = run_plain(path, requests[name])
    console.print("plain vLLM has answered all requests, one model at a time")
    pool_file = _write_pool(folder, paths, device_memory, settings)
    report = DemoReport(
        device_memory_bytes=device_memory,
        kv_memory_bytes=KV_MEMORY_BYTES,
        models=[],
    )
    with running_server(pool_file, folder / "server.log", console) as server:
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


def run_plain(model: Path, requests: Sequence[Request]) -> list[list[int]]:
    """The token ids that plain vLLM, alone in a process of its own, answers to `requests`."""
    job = {
        "model": str(model),
        "max_model_len": MAX_MODEL_LEN,
        "kv_memory": KV_MEMORY_BYTES,
        "requests": [asdict(request) for request in requests],
    }
    environment = envs.child_environment(
        {
            "AEGAEON_ENABLE": None,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "aegaeon.vllm_plugin.plain"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise AegaeonError(f"plain vLLM failed with {model}:\n{done.stderr[-4000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    token_ids: list[list[int]] = answer["token_ids"]
    return token_ids


async def _serve_all(
    server: "RunningServer",
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


async def _sample_occupancy(server: "RunningServer", report: DemoReport) -> None:
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


# -- the server ----------------------------------------------------------------------------------


@dataclass
class RunningServer:
    """An `aegaeon serve` process, started by `running_server`."""

    address: str
    admin_socket: Path
    start_s: float
    stop_s: float = 0.0

    def admin(self, path: str) -> Any:
        transport = httpx.HTTPTransport(uds=str(self.admin_socket))
        with httpx.Client(transport=transport, base_url="http://admin", timeout=10) as client:
            return client.get(path).raise_for_status().json()


@contextmanager
def running_server(pool_file: Path, log: Path, console: Console) -> Iterator[RunningServer]:
    """Start `aegaeon serve` on a free port; on exit end it by Ctrl-C and time that.

    Raises AegaeonError, with the end of the log, when it does not start or does not end.
    """
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "aegaeon", "serve", str(pool_file), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
        try:
            with console.status("starting the server"):
                address = _wait_until_ready(process, log)
            server = RunningServer(
                address=address,
                admin_socket=_admin_socket(pool_file),
                start_s=time.monotonic() - started,
            )
            yield server
            stopping = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=STOP_TIMEOUT_S)
            server.stop_s = time.monotonic() - stopping
        except subprocess.TimeoutExpired as error:
            raise AegaeonError(f"the server did not end within {STOP_TIMEOUT_S} s") from error
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _wait_until_ready(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("aegaeon serves "):
            return line.rsplit(" on ", 1)[1].strip().removesuffix("/v1")
    process.wait()
    tail = log.read_text(errors="replace")[-4000:]
    raise AegaeonError(f"the server ended with status {process.returncode}:\n{tail}")


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


def _admin_socket(pool_file: Path) -> Path:
    return Path(yaml.safe_load(pool_file.read_text())["admin"]["socket"])


@contextmanager
def _folder(workdir: Path | None) -> Iterator[Path]:
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="aegaeon-demo-") as name:
        yield Path(name)
