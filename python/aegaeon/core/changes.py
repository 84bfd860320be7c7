"""What is different in a pool file that was edited, and what of it a running server can take on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .config import ModelConfig, PoolConfig

# The rest is fixed when the instance starts: memory, engines, addresses.
LIVE_MODEL_KEYS = ("slo", "priority", "pin", "aliases", "keep_alive")
LIVE_SERVER_KEYS = (
    *("max_queued_requests", "max_open_requests", "max_n", "max_body_bytes"),
    "drain_timeout",
)
_NOTHING = object()


@dataclass(frozen=True)
class Change:
    """One key that differs. live: whether it takes effect without a restart of the server.

    before, after: None where the key is not there, as of a model that is new.
    is_a_model: it is not a key but a model that comes or goes.
    """

    key: str
    before: Any
    after: Any
    live: bool
    is_a_model: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def changes(old: PoolConfig, new: PoolConfig) -> list[Change]:
    """Every key that differs, in the order of the file. `defaults` show in the models."""
    found: list[Change] = []
    for name in PoolConfig.model_fields:
        if name == "defaults":
            continue
        before, after = getattr(old, name), getattr(new, name)
        if name == "models":
            found += _model_changes(before, after)
        elif hasattr(before, "model_dump"):
            found += list(_fields(name, before.model_dump(), after.model_dump()))
        elif before != after:
            found.append(Change(name, before, after, live=False))
    return found


def taken_on(old: PoolConfig, new: PoolConfig) -> PoolConfig:
    """`old` with the live keys of `new`. The models stay, which come and go one by one; of their
    aliases those that are free.
    """
    models, names = [], {model.name for model in old.models}
    for model in old.models:
        edited = next((each for each in new.models if each.name == model.name), model)
        update = {key: getattr(edited, key) for key in LIVE_MODEL_KEYS}
        update["aliases"] = tuple(alias for alias in edited.aliases if alias not in names)
        names.update(update["aliases"])
        models.append(model.model_copy(update=update))
    return old.model_copy(
        update={
            "models": tuple(models),
            "supervision": new.supervision,
            "server": old.server.model_copy(
                update={key: getattr(new.server, key) for key in LIVE_SERVER_KEYS}
            ),
            "scheduler": old.scheduler.model_copy(update={"admission": new.scheduler.admission}),
        }
    )


def _model_changes(old: tuple[ModelConfig, ...], new: tuple[ModelConfig, ...]) -> Iterator[Change]:
    before = {model.name: model for model in old}
    after = {model.name: model for model in new}
    for name, model in before.items():
        if name not in after:
            yield Change(f"models[{name}]", "served", None, live=True, is_a_model=True)
        else:
            yield from _fields(f"models[{name}]", model.model_dump(), after[name].model_dump())
    for name in after.keys() - before.keys():
        yield Change(f"models[{name}]", None, "to be served", live=True, is_a_model=True)


def _fields(at: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    for key in old | new:
        before, after = old.get(key, _NOTHING), new.get(key, _NOTHING)
        if before == after:
            continue
        if at.startswith("models"):
            live = key in LIVE_MODEL_KEYS
        elif at == "server":
            live = key in LIVE_SERVER_KEYS
        else:
            live = at == "supervision" or (at, key) == ("scheduler", "admission")
        yield Change(
            f"{at}.{key}",
            None if before is _NOTHING else before,
            None if after is _NOTHING else after,
            live,
        )
