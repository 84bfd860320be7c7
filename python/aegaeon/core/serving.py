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
    adapters: names of its adapters, by which it is asked for too.
    rename: has the application answer to these aliases beside the name, and to no others.
    """

    name: str
    aliases: tuple[str, ...]
    app: AsgiApp
    cards: Callable[[], Awaitable[list[dict[str, Any]]]]
    rename: Callable[[tuple[str, ...]], None] = lambda aliases: None
    adapters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases, *self.adapters)


def unserved(name: str, aliases: tuple[str, ...]) -> ServedModel:
    """A model of the pool that has no application, because it could not be loaded.

    It is listed under its names; the router answers for it.
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError(f"the router answers for {name!r}, which has failed")

    async def cards() -> list[dict[str, Any]]:
        return [
            {"id": each, "object": "model", "owned_by": "aegaeon", "root": name}
            for each in (name, *aliases)
        ]

    return ServedModel(name=name, aliases=aliases, app=app, cards=cards)
