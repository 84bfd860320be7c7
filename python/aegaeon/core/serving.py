"""What the router needs from one model's application; built by `vllm_plugin`, used by `server`."""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

# An ASGI application, spelled out so that this package needs no web framework.
AsgiApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]


@dataclass(frozen=True)
class ServedModel:
    """One model's OpenAI application.

    cards: its entries of `/v1/models`, one per served name.
    rename: has the application answer to these aliases beside the name, and to no others.
    """

    name: str
    aliases: tuple[str, ...]
    app: AsgiApp
    cards: Callable[[], Awaitable[list[dict[str, Any]]]]
    rename: Callable[[tuple[str, ...]], None] = lambda aliases: None
