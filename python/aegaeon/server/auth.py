"""API keys: kept as hashes in a file and in memory, compared in constant time."""

import hashlib
import hmac
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from aegaeon.core.errors import ConfigError
from aegaeon.server.errors import error_response

logger = logging.getLogger(__name__)

KEY_PREFIX = "ak-"
_KEY_BYTES = 32
_LINE = re.compile(r"sha256:([0-9a-fA-F]{64})(?:\s+(\S.*))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class _Known:
    digest: bytes
    name: str


class ApiKeys:
    """The keys of a file: one `sha256:<hex digest> [name]` per line; # begins a comment line.

    Raises ConfigError, never with a key in the message, for a file that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _read(path)

    def allow(self, authorization: str | None) -> bool:
        """Whether the header is `Bearer <one of the keys>`; takes the same time for any key."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known.digest) for known in self._known]
        return any(matches)

    def reload(self) -> None:
        """Take what the file says now; one that cannot be used changes nothing and is logged."""
        try:
            known = _read(self.path)
        except (ConfigError, OSError) as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        before = {each.digest: each.name for each in self._known}
        after = {each.digest: each.name for each in known}
        self._known = known
        for digest in before.keys() ^ after.keys():
            verb = "is accepted now" if digest in after else "is not accepted any more"
            logger.info("%s: the key %r %s", self.path.name, (after | before)[digest], verb)


class WithKey:
    """Around an application all of whose routes need a key, none excepted."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = dict(scope["headers"]).get(b"authorization")
        if self._keys.allow(None if given is None else given.decode("latin-1")):
            await self._app(scope, receive, send)
        else:
            await unauthorized()(scope, receive, send)


def unauthorized() -> Response:
    """The 401 that both listeners answer, without a word on why a key does not do."""
    return error_response(
        401,
        "a valid API key is required: send it as 'Authorization: Bearer <key>'",
        type="authentication_error",
        code="invalid_api_key",
    )


def add_key(path: Path, name: str) -> str:
    """Append the hash of a new key to the file at `path`, and return the key.

    The file is made if it is not there, for this user alone. Raises ValueError for a name that
    does not fit on the line, ConfigError for a file that is not one of keys.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name: got {name!r}; expected letters, digits and . _ @ -, at most 64 characters"
        )
    before = path.read_bytes() if path.exists() else b""
    if before.strip():
        _read(path)
    key = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    line = f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {name}\n"
    if before and not before.endswith(b"\n"):
        line = "\n" + line  # not a part of the line that an editor left unfinished
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(line)
    return key


def _read(path: Path) -> tuple[_Known, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        # Without its cause, which holds the bytes.
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    known = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            # Not the line itself: it may be a key that was meant to stay one.
            raise ConfigError(
                f"{path}:{number}: expected 'sha256:<64 hex digits> [name]'; `aegaeon key FILE` "
                f"makes a key and writes its line"
            )
        known.append(_Known(bytes.fromhex(match[1]), match[2] or f"line {number}"))
    if not known:
        raise ConfigError(f"{path}: no API key in the file; `aegaeon key FILE` adds one")
    return tuple(known)
