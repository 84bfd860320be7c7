"""A client of a running server's admin listener, and how to find that listener."""

import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from aegaeon.core.errors import AegaeonError

RUNTIME_DIR_PREFIX = "aegaeon-"
SOCKET_NAME = "admin.sock"
# Only a form: what is asked is the socket.
_BASE_URL = "http://localhost"


class AdminError(AegaeonError):
    """The admin listener refused, or nobody listens. Handled by the command line."""


def is_answered(path: Path) -> bool:
    """Whether a server listens on the unix socket `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def find_admin_socket() -> Path:
    """The admin socket of this user's one running server whose pool file names none.

    Raises AdminError when there is none, or more than one.
    """
    folder = Path(tempfile.gettempdir())
    found = [
        path
        for path in sorted(folder.glob(f"{RUNTIME_DIR_PREFIX}*/{SOCKET_NAME}"))
        # A folder that somebody else has made there is not believed.
        if path.parent.stat().st_uid == os.getuid() and is_answered(path)
    ]
    if not found:
        raise AdminError(
            f"no running server was found in {folder}: start one with `aegaeon serve POOL.YAML`; "
            f"if its pool file names an admin socket, give --pool POOL.YAML or --socket PATH"
        )
    if len(found) > 1:
        listed = "\n  ".join(str(path) for path in found)
        raise AdminError(f"several servers run; say which with --socket:\n  {listed}")
    return found[0]


class AdminClient:
    """Answers of one server's admin listener.

    All calls raise AdminError, with the server's reason, when it refuses or is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, path: str) -> Any:
        return self._ask("GET", path, timeout_s=10.0)

    def order(self, verb: str, model: str) -> Any:
        """load, unload, pin or unpin; returns when it is done, however long it takes."""
        return self._ask("POST", f"/admin/models/{quote(model)}/{verb}", timeout_s=None)

    def add(self, entry: Mapping[str, Any]) -> Any:
        """Load one more model, as it would stand in the pool file; its description."""
        return self._ask("POST", "/admin/models", timeout_s=None, body=dict(entry))

    def remove(self, model: str, *, timeout_s: float) -> Any:
        """Remove a model when its open requests have ended, at most in `timeout_s`."""
        path = f"/admin/models/{quote(model)}?timeout_s={timeout_s:g}"
        return self._ask("DELETE", path, timeout_s=None)

    async def events(
        self, *, interval_s: float = 1.0, parts: Sequence[str] = ("switches",)
    ) -> AsyncIterator[tuple[str, Any]]:
        """(`snapshot` or `error`, data), without end; raises AdminError when the server ends.

        parts: what comes beside the state: switches, timeline.
        """
        self._must_be_there()
        query = {"interval_s": f"{interval_s:g}", "with": ",".join(parts)}
        transport = httpx.AsyncHTTPTransport(uds=str(self.path))
        try:
            async with (
                httpx.AsyncClient(
                    transport=transport, base_url=_BASE_URL, timeout=interval_s + 30.0
                ) as client,
                client.stream("GET", "/admin/events", params=query) as response,
            ):
                if response.is_error:
                    await response.aread()
                    raise _refusal(response)
                event = ""
                async for line in response.aiter_lines():
                    if line.startswith("event: "):
                        event = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        yield event, json.loads(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise AdminError(f"the server at {self.path} has ended")

    def _ask(self, method: str, path: str, *, timeout_s: float | None, body: Any = None) -> Any:
        self._must_be_there()
        try:
            with self._client(timeout_s) as client:
                response = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise _refusal(response)
        return response.json()

    def _client(self, timeout_s: float | None) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.path))
        return httpx.Client(transport=transport, base_url=_BASE_URL, timeout=timeout_s)

    def _must_be_there(self) -> None:
        # httpx would leave its socket open when nobody answers.
        if not is_answered(self.path):
            raise AdminError(f"no server listens on {self.path}")

    def _unreachable(self, error: httpx.HTTPError) -> AdminError:
        return AdminError(f"the server at {self.path} does not answer: {error}")


def _refusal(response: httpx.Response) -> AdminError:
    try:
        return AdminError(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return AdminError(f"the server answered with status {response.status_code}")
