"""Where the server listens: bound sockets, and uvicorn's servers on them."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from aegaeon.core.errors import AegaeonError
from aegaeon.server.admin_client import is_answered
from aegaeon.server.protocol import BoundedProtocol

# Every connection is one; the usual limit of 1024 is that of a desktop.
_OPEN_FILES = 65536


class Server(uvicorn.Server):
    """Without signal handlers of its own: there are two servers, and one decision to stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def uvicorn_config(app: Any, http: type[BoundedProtocol] = BoundedProtocol) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        http=http,
        ws="none",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=1,
        server_header=False,
    )


def tcp_listener(host: str, port: int) -> socket.socket:
    """A bound socket; taken before anything is loaded, so that a port in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise AegaeonError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def allow_many_files() -> None:
    """Raise this process's limit of open files, and that of its children, as far as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(most, _OPEN_FILES)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


@contextmanager
def unix_listener(path: Path) -> Iterator[socket.socket]:
    """A bound unix socket that only this user may use; its file goes with it.

    The file of a server that was killed is taken over; that of a running one is not.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if path.is_socket() and not is_answered(path):
            path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise AegaeonError(
                f"cannot create the admin socket {path}: {error.strerror}"
            ) from error
        finally:
            os.umask(mask)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
