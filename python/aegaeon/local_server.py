"""An `aegaeon serve` process for as long as a block of code runs: for the demo, tests and bench."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aegaeon.core.errors import AegaeonError
from aegaeon.server.admin_client import AdminClient

STOP_TIMEOUT_S = 5.0


@dataclass
class LocalServer:
    """A running server. `start_s`: until it was ready; `stop_s`: from Ctrl-C to its end."""

    address: str
    admin_socket: Path
    process: subprocess.Popen[str]
    start_s: float
    stop_s: float = 0.0

    def admin(self, path: str) -> Any:
        """The JSON answer of the admin listener to GET `path`."""
        return AdminClient(self.admin_socket).get(path)


@contextmanager
def local_server(pool_file: Path, *, log: Path) -> Iterator[LocalServer]:
    """Start a server for `pool_file` on a free port; on exit end it by Ctrl-C.

    pool_file: must name an admin socket. log: takes the server's standard error.
    Raises AegaeonError, with the end of the log, when it does not start, and when it does not end
    within STOP_TIMEOUT_S.
    """
    admin_socket = Path(yaml.safe_load(pool_file.read_text())["admin"]["socket"])
    started = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "aegaeon", "serve", str(pool_file), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        address = _wait_until_ready(process, log)
        server = LocalServer(address, admin_socket, process, time.monotonic() - started)
        yield server
        if process.poll() is None:
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
            # Whatever else it prints must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return line.rsplit(" on ", 1)[1].strip().removesuffix("/v1")
    process.wait()
    tail = log.read_text(errors="replace")[-4000:]
    raise AegaeonError(f"the server ended with status {process.returncode}:\n{tail}")
