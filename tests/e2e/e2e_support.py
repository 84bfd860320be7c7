"""What the end-to-end tests share: requests, jobs for the example programs, and how to run them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from aegaeon import checkpoint
from aegaeon.local_server import LocalServer

PROGRAMS = Path(__file__).parent / "programs"
MAX_MODEL_LEN = 512
KV_MEMORY = 16 << 20
PROGRAM_TIMEOUT_S = 280
BODY_LIMIT = 1 << 20
CHAT = "/v1/chat/completions"

Requests = dict[str, list[dict[str, Any]]]


def requests_for(names: list[str], *, per_model: int = 5, max_tokens: int = 24) -> Requests:
    """Greedy and seeded sampling in turn; a shared beginning longer than a KV block of 128."""
    beginning = "In the old harbour, between the fish market and the customs house, " * 6
    return {
        name: [
            {
                "prompt": f"{beginning if i % 2 else ''}{name} {i}: " + "tell me more. " * (i + 1),
                "sampling": {
                    "max_tokens": max_tokens + i,
                    "temperature": 0.0 if i % 2 == 0 else 0.9,
                    "seed": 100 + i,
                    "ignore_eos": True,
                },
            }
            for i in range(per_model)
        ]
        for name in names
    }


def job_for(models: dict[str, str], requests: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Device memory for the largest model and its KV cache, and for nothing beside it."""
    largest = max(checkpoint.weight_bytes(name, Path(path)) for name, path in models.items())
    return {
        "models": models,
        "requests": requests,
        "device_memory": -(-(largest + (2 << 20)) // (2 << 20)) * (2 << 20) + KV_MEMORY,
        "kv_memory": KV_MEMORY,
        "max_model_len": MAX_MODEL_LEN,
        "quantum": 1,
        **options,
    }


def run_program(name: str, job: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run tests/e2e/programs/<name>.py with `job` on its standard input, to its end."""
    return subprocess.run(
        [sys.executable, str(PROGRAMS / f"{name}.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=PROGRAM_TIMEOUT_S,
        check=False,
    )


# -- servers ---------------------------------------------------------------------------------


def write_pool(folder: Path, models: dict[str, str], **changes: Any) -> Path:
    pool = {
        "device": "host",
        "device_memory": job_for(models, {})["device_memory"],
        "defaults": {"kv_memory": KV_MEMORY, "max_model_len": MAX_MODEL_LEN},
        "models": [{"model": path, "name": name} for name, path in models.items()],
        "scheduler": {"quantum": 2},
        "server": {"max_body_bytes": BODY_LIMIT},
        "admin": {"socket": str(folder / "admin.sock")},
        **changes,
    }
    file = folder / "pool.yaml"
    file.write_text(yaml.safe_dump(pool))
    return file


def chat(name: str, content: str = "Hello.", **options: Any) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": content}], **options}


def gauge(server: LocalServer, metric: str, model: str) -> float:
    for line in httpx.get(f"{server.address}/metrics").text.splitlines():
        if line.startswith(f"{metric}{{") and f'model_name="{model}"' in line:
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"{metric} has no series for {model}")


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def leftovers(folder: Path) -> set[str]:
    """What a server could leave behind outside of its own folder: shared memory that no process
    has mapped (what others use is theirs), and its runtime folder.
    """
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped += maps.read_text()
    shared = {str(path) for path in Path("/dev/shm").iterdir() if str(path) not in mapped}
    return shared | {str(path) for path in folder.glob("aegaeon-*")}


def start(pool: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "aegaeon", "serve", str(pool), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def instance_of(pid: int) -> psutil.Process:
    """The instance that the server `pid` runs now."""
    found = [p for p in children_of(pid) if "aegaeon.vllm_plugin.instance" in p.cmdline()]
    assert len(found) == 1, found
    return found[0]
