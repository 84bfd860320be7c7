"""A pool file that is edited: what is taken on at once, what waits, and what is refused."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from aegaeon.core.changes import changes, taken_on
from aegaeon.core.config import PoolConfig, load_pool
from aegaeon.core.errors import AegaeonError, OrderRefused
from aegaeon.pool_reload import PoolReload, PoolSource

BASE: dict[str, Any] = {
    "models": [
        {"model": "a", "aliases": ["first"], "slo": {"ttft_ms": 500}},
        {"model": "b", "priority": 1},
    ],
    "server": {"max_n": 4, "port": 8000},
}


def pool_of(folder: Path, **edits: Any) -> PoolConfig:
    for name in ("a", "b", "c"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "pool.yaml").write_text(yaml.safe_dump({**BASE, **edits}))
    return load_pool(folder / "pool.yaml")


def model(name: str, **edits: Any) -> dict[str, Any]:
    known = next((each for each in BASE["models"] if each["model"] == name), {"model": name})
    return {**known, **edits}


def test_the_same_file_is_no_change(tmp_path):
    assert changes(pool_of(tmp_path), pool_of(tmp_path)) == []


@pytest.mark.parametrize(
    ("edits", "keys", "live"),
    [
        ({"models": [model("a", slo={"ttft_ms": 9}), model("b")]}, ["models[a].slo"], True),
        ({"models": [model("a", aliases=[]), model("b")]}, ["models[a].aliases"], True),
        ({"models": [model("a", pin=True), model("b")]}, ["models[a].pin"], True),
        ({"models": [model("a"), model("b", priority=7)]}, ["models[b].priority"], True),
        ({"server": {"max_n": 2, "port": 8000}}, ["server.max_n"], True),
        ({"supervision": {"max_restarts": 0}}, ["supervision.max_restarts"], True),
        ({"scheduler": {"admission": "deadline"}}, ["scheduler.admission"], True),
        ({"defaults": {"slo": {"tpot_ms": 5}}}, ["models[a].slo", "models[b].slo"], True),
        ({"scheduler": {"policy": "slack"}}, ["scheduler.policy"], False),
        ({"server": {"max_n": 4, "port": 9}}, ["server.port"], False),
        ({"device_memory": "1GiB"}, ["device_memory"], False),
        ({"models": [model("a", kv_memory="1GiB"), model("b")]}, ["models[a].kv_memory"], False),
    ],
)
def test_every_key_that_differs_is_named_and_what_is_not_live_is_not_taken_on(
    tmp_path, edits, keys, live
):
    old = pool_of(tmp_path)
    new = pool_of(tmp_path, **edits)
    found = changes(old, new)
    assert [change.key for change in found] == keys
    assert all(change.live is live for change in found)
    effective = taken_on(old, new)
    assert (effective == old) is not live
    assert [change.key for change in changes(effective, new)] == ([] if live else keys)


def test_the_name_of_a_model_that_is_still_served_is_not_taken_as_an_alias(tmp_path):
    old = pool_of(tmp_path)
    new = pool_of(tmp_path, models=[model("a", aliases=["b", "second"])])
    assert taken_on(old, new).models[0].aliases == ("second",)


class Served:
    """Notes which models come and go; refuses what it is told to."""

    def __init__(self, *refused: str) -> None:
        self.calls: list[str] = []
        self.refused = set(refused)

    async def add(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        self._note(f"add {entry['name']} {entry['kv_memory']}")
        return {}

    async def remove(self, name: str, *, timeout_s: float) -> None:
        self._note(f"remove {name} {timeout_s:g}")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self.refused:
            raise OrderRefused("there is no room")


def test_models_come_and_go_with_the_file_and_what_failed_is_tried_with_the_next_change(
    tmp_path, caplog
):
    old = pool_of(tmp_path)
    path = tmp_path / "pool.yaml"
    applied: list[PoolConfig] = []

    async def apply(before: PoolConfig, after: PoolConfig) -> None:
        applied.append(after)

    served = Served(f"add c {1 << 30}")
    reload = PoolReload(PoolSource(path, lambda: load_pool(path)), old, apply, served)

    async def run() -> None:
        found = changes(old, pool_of(tmp_path, models=[model("a"), model("c", kv_memory="1GiB")]))
        assert [(change.key, change.live) for change in found] == [
            ("models[b]", True), ("models[c]", True),
        ]  # fmt: skip
        await reload.reload()
        assert served.calls == ["remove b 30", f"add c {1 << 30}"]
        pool_of(tmp_path, models=[model("a"), model("c", kv_memory="1MiB")])
        await reload.reload()
        await reload.reload()
        assert served.calls[2:] == [f"add c {1 << 20}"]

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert [[each.name for each in pool.models] for pool in applied] == [["a"], ["a"], ["a", "c"]]
    assert "c is not added: there is no room" in caplog.text
    assert "models[b]: removed" in caplog.text


def test_a_change_is_taken_on_and_said_and_a_bad_file_changes_nothing(tmp_path, caplog):
    old = pool_of(tmp_path)
    applied: list[PoolConfig] = []

    async def apply(before: PoolConfig, after: PoolConfig) -> None:
        if after.server.max_n == 3:
            raise AegaeonError("the instance is being started anew")
        applied.append(after)

    path = tmp_path / "pool.yaml"
    reload = PoolReload(PoolSource(path, lambda: load_pool(path)), old, apply, Served())

    async def run() -> None:
        path.write_text("models: [{model: a, pritority: 3}]")
        await reload.reload()
        assert applied == []
        pool_of(tmp_path, server={"max_n": 3, "port": 8000})
        await reload.reload()
        assert applied == []
        pool_of(tmp_path, server={"max_n": 2, "port": 9})
        await reload.reload()

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert [(pool.server.max_n, pool.server.port) for pool in applied] == [(2, 8000)]
    assert "did you mean 'priority'" in caplog.text
    assert "could not be taken on, yet: the instance is being started anew" in caplog.text
    assert "server.max_n: 4 -> 2" in caplog.text
    assert "server.port: 8000 -> 9: needs a restart of the server" in caplog.text
