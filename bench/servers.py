"""The servers that are compared, each as processes of its own with the same settings.

Both run eagerly, with the same KV cache, context length and number of compute threads, and without
prefix caching, so that no answer is cheaper for having been asked before.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import yaml

from aegaeon import checkpoint
from aegaeon.core import envs
from aegaeon.local_server import local_server

PLAIN_WEIGHTS = Path(__file__).parent / "peers" / "plain_weights"
KV_MEMORY = 64 << 20
MAX_MODEL_LEN = 1024
DEVICE_PAGE = 2 << 20
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


@dataclass
class Server:
    """A running server. Seconds: until it answered, and from the signal to its end."""

    address: str
    pid: int
    start_s: float
    stop_s: float = 0.0

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far, without those that have ended."""
        parent = psutil.Process(self.pid)
        spent = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
        return sum(times.user + times.system for times in spent)


def room_for_one(models: Mapping[str, Path]) -> int:
    """Device memory for the largest of the models, and for nothing beside it."""
    largest = max(checkpoint.weight_bytes(name, path) for name, path in models.items())
    return -(-largest // DEVICE_PAGE) * DEVICE_PAGE + DEVICE_PAGE + KV_MEMORY


@contextmanager
def aegaeon_server(
    models: Mapping[str, Path], folder: Path, *, quantum: int = 8
) -> Iterator[Server]:
    """`aegaeon serve` with all `models`, on a device that holds one of them at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = {
        "device": "host",
        "device_memory": room_for_one(models),
        "defaults": {"kv_memory": KV_MEMORY, "max_model_len": MAX_MODEL_LEN},
        "models": [
            {"model": str(path), "name": name, "vllm": {"enable_prefix_caching": False}}
            for name, path in models.items()
        ],
        "scheduler": {"policy": "round-robin", "quantum": quantum},
        "admin": {"socket": str(folder / "admin.sock")},
    }
    pool_file = folder / "pool.yaml"
    pool_file.write_text(yaml.safe_dump(pool))
    envs.set_vllm_defaults()
    with local_server(pool_file, log=folder / "aegaeon.log") as running:
        server = Server(running.address, running.process.pid, running.start_s)
        yield server
    server.stop_s = running.stop_s


@contextmanager
def vllm_server(
    name: str,
    model: Path,
    folder: Path,
    *options: str,
    plain_weights: bool,
    kv_memory: int = KV_MEMORY,
    max_model_len: int = MAX_MODEL_LEN,
    eager: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Stock vLLM's server with one model; environment: variables to set for it.

    Started as the module that `vllm serve` ends in: the command itself asks for the metadata of a
    distribution called vllm, which the CPU wheel does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    envs.set_vllm_defaults()
    environment = envs.child_environment({"AEGAEON_ENABLE": None, **(environment or {})})
    if plain_weights:
        paths = [str(PLAIN_WEIGHTS), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    port = _free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--model", str(model)),
        *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--kv-cache-memory-bytes", str(kv_memory), "--max-model-len", str(max_model_len)),
        *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
        *(["--enforce-eager"] if eager else []),
        *options,
    ]
    started = time.monotonic()
    with (folder / "vllm.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_healthy(address, process, folder / "vllm.log")
        server = Server(address, process.pid, time.monotonic() - started)
        yield server
        stopping = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=STOP_TIMEOUT_S)
        server.stop_s = time.monotonic() - stopping
    finally:
        with suppress(ProcessLookupError):  # nothing of its process group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(f"{address}/health").status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")
