"""API keys of the public listener: hashed in memory, compared in constant time."""

import hashlib
import hmac
from pathlib import Path

from aegaeon.core.errors import ConfigError


class ApiKeys:
    """The keys of a file: one per line; empty lines and lines that start with # are ignored."""

    def __init__(self, path: Path) -> None:
        lines = [line.strip() for line in path.read_text().splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{path}: no API key in the file; expected one per line")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, authorization: str | None) -> bool:
        """Whether the header is `Bearer <one of the keys>`; takes the same time for any key."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)
