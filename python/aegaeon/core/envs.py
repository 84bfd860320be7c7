"""The environment variables that `aegaeon` reads, and the only place that reads `os.environ`.

One function per variable, read at the time of the call and parsed strictly: a value that is set but
malformed raises `ConfigError` with the name, the value and the accepted form. An empty value counts
as unset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOG_FORMATS = ("human", "json")


class Variable(NamedTuple):
    """One variable: what it does, as `aegaeon --help` and the documentation print it."""

    name: str
    accepted: str
    meaning: str


VARIABLES = (
    Variable(
        "AEGAEON_ENABLE",
        "0 or 1",
        "act in this vLLM process; without it the vLLM plugin is loaded but changes nothing",
    ),
    Variable("AEGAEON_LOG_LEVEL", " | ".join(LOG_LEVELS), "least severe message that is printed"),
    Variable("AEGAEON_LOG_FORMAT", " | ".join(LOG_FORMATS), "lines for people, or JSON objects"),
    Variable(
        "AEGAEON_POISON_MEMORY",
        "0 or 1",
        "fill device memory with NaNs when it changes hands: reading what nobody wrote shows",
    ),
)
NAMES = tuple(variable.name for variable in VARIABLES)


def enable() -> bool:
    """AEGAEON_ENABLE: whether the plugin acts in this process. Default: no."""
    return _flag("AEGAEON_ENABLE")


def log_level() -> str:
    """AEGAEON_LOG_LEVEL: one of LOG_LEVELS. Default: INFO."""
    value = _get("AEGAEON_LOG_LEVEL")
    if value is None:
        return "INFO"
    if value.upper() not in LOG_LEVELS:
        raise _malformed("AEGAEON_LOG_LEVEL", value)
    return value.upper()


def log_format() -> str:
    """AEGAEON_LOG_FORMAT: one of LOG_FORMATS. Default: human."""
    value = _get("AEGAEON_LOG_FORMAT") or "human"
    if value not in LOG_FORMATS:
        raise _malformed("AEGAEON_LOG_FORMAT", value)
    return value


def poison_memory() -> bool:
    """AEGAEON_POISON_MEMORY: whether mapped memory that is not zeroed is filled with NaNs. Default:
    no.
    """
    return _flag("AEGAEON_POISON_MEMORY")


def hub_cache_dir() -> Path:
    """Where the Hugging Face libraries keep downloaded models (their HF_HUB_CACHE and HF_HOME are
    honoured).
    """
    cache = _get("HF_HUB_CACHE")
    if cache is not None:
        return Path(cache).expanduser()
    home = _get("HF_HOME")
    if home is not None:
        return Path(home).expanduser() / "hub"
    return cache_dir() / "huggingface" / "hub"


def cache_dir() -> Path:
    """Where this user keeps what can be made again (XDG_CACHE_HOME is honoured)."""
    base = _get("XDG_CACHE_HOME")
    return Path(base) if base is not None else Path.home() / ".cache"


def lookup(name: str) -> str | None:
    """The value of any variable, for `${env.NAME}` in a pool file; None when unset."""
    return os.environ.get(name)


def set_vllm_defaults() -> None:
    """Before vLLM is imported here or in a child: no connections to the outside, few messages, and
    a core left to the front, as vLLM's own CPU executor does it.

    Only what the user has not set. vLLM, the Hugging Face libraries and OpenMP read these.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1)),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG" if log_level() == "DEBUG" else "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def child_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment for a child, with `changes` applied; None removes a variable."""
    environment = dict(os.environ)
    for name, value in changes.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return environment


def _flag(name: str) -> bool:
    value = _get(name)
    if value is None:
        return False
    if value not in ("0", "1"):
        raise _malformed(name, value)
    return value == "1"


def _get(name: str) -> str | None:
    return os.environ.get(name) or None


def _malformed(name: str, value: str) -> ConfigError:
    accepted = next(variable.accepted for variable in VARIABLES if variable.name == name)
    return ConfigError(f"environment variable {name}: got {value!r}; expected {accepted}")
