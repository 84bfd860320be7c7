"""Orders and the admin application over a real switcher on the host driver."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from switcher_support import KV, WEIGHTS, assert_every_live_block_is_somewhere, make_switcher

from aegaeon.core.clock import MonotonicClock
from aegaeon.core.errors import (
    AegaeonError,
    CapacityError,
    ConfigError,
    InstanceDied,
    ModelLoadError,
    OrderRefused,
)
from aegaeon.server.admin import admin_app
from aegaeon.switching.orders import ORDERS, carry_out
from aegaeon.switching.snapshot import describe, records_of, state_of
from aegaeon.switching.switcher import Switcher

ONE = WEIGHTS + KV


def call(switcher: Switcher, method: str, path: str, *, dead: bool = False) -> httpx.Response:
    async def ask(question: str, *, timeout_s: float | None = 5.0, **arguments: Any) -> Any:
        if dead:
            raise InstanceDied("host", -9)
        if question in ORDERS:
            return describe(carry_out(switcher, question, arguments["model"]))
        if question == "switches":
            return records_of(switcher, **arguments)
        return state_of(switcher, MonotonicClock(), {})

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(admin_app(ask), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return await client.request(method, path)

    return asyncio.run(run())


def state_in(switcher: Switcher, name: str) -> str:
    return switcher.models[name].state.value


def test_load_and_unload_move_a_model_and_keep_its_bytes():
    switcher, (a, b, _) = make_switcher(capacity=ONE)
    assert call(switcher, "POST", "/admin/models/a/load").json()["state"] == "resident"
    a.write(3, 33)
    assert call(switcher, "POST", "/admin/models/a/unload").json()["state"] == "host"
    assert switcher.arena.stats().free_bytes == ONE
    assert_every_live_block_is_somewhere([a, b])
    call(switcher, "POST", "/admin/models/a/load")
    a.assert_intact()


def test_unload_drops_kv_that_the_host_has_no_room_for():
    switcher, (a, *_) = make_switcher(capacity=ONE, host_kv=2 << 20)
    store = switcher.kv_store
    held = store.allocate(a.kv.slot_bytes, (2 << 20) // a.kv.slot_bytes)
    switcher.activate("a")
    a.write(3, 33)
    switcher.evict("a")
    assert (a.contents, state_in(switcher, "a")) == ({}, "host")
    assert switcher.totals.dropped_blocks == 1
    store.release(held)


def test_a_pinned_or_busy_model_is_not_unloaded():
    switcher, _ = make_switcher(capacity=2 * ONE)
    call(switcher, "POST", "/admin/models/a/pin")
    refused = call(switcher, "POST", "/admin/models/a/unload")
    assert refused.status_code == 409
    assert "pinned" in refused.json()["error"]["message"]
    call(switcher, "POST", "/admin/models/a/unpin")
    switcher.is_busy = lambda name: name == "a"
    refused = call(switcher, "POST", "/admin/models/a/unload")
    assert (refused.status_code, state_in(switcher, "a")) == (409, "resident")
    assert "open requests" in refused.json()["error"]["message"]


def test_a_pin_that_would_leave_no_room_for_another_model_is_refused():
    switcher, _ = make_switcher(capacity=ONE)
    with pytest.raises(OrderRefused, match="'b' needs 6 MiB"):
        carry_out(switcher, "pin", "a")
    assert not switcher.models["a"].pinned


def test_an_unknown_model_is_a_404_and_a_dead_instance_a_503():
    switcher, _ = make_switcher(capacity=ONE)
    unknown = call(switcher, "POST", "/admin/models/x/load")
    assert unknown.status_code == 404
    assert "a, b, c" in unknown.json()["error"]["message"]
    for path in ("/admin/state", "/admin/events", "/is_sleeping?model=a"):
        gone = call(switcher, "GET", path, dead=True)
        assert (gone.status_code, gone.headers["retry-after"]) == (503, "1")


def test_sleep_and_wake_up_are_those_of_vllm():
    switcher, _ = make_switcher(capacity=ONE)
    assert call(switcher, "POST", "/wake_up").status_code == 400
    assert call(switcher, "POST", "/wake_up?model=a").json()["status"] == "awake"
    assert call(switcher, "GET", "/is_sleeping?model=a").json() == {"is_sleeping": False}
    assert call(switcher, "POST", "/sleep?model=a&level=9").status_code == 400
    slept = call(switcher, "POST", "/sleep?model=a&level=2").json()
    assert slept == {"status": "sleeping", "level": 2}
    assert call(switcher, "GET", "/is_sleeping?model=a").json() == {"is_sleeping": True}


class Models:
    """Notes what it is asked for."""

    def __init__(self, refusal: AegaeonError | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refusal = refusal

    async def add(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(("add", dict(entry)))
        if self.refusal is not None:
            raise self.refusal
        return {"name": "x", "state": "resident"}

    async def remove(self, name: str, *, timeout_s: float) -> None:
        self.calls.append(("remove", name, timeout_s))


def change(models: Models, method: str, path: str, **content: Any) -> httpx.Response:
    async def ask(question: str, **arguments: Any) -> Any:
        raise AssertionError("the instance is not asked")

    async def run() -> httpx.Response:
        app = admin_app(ask, models=models)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return await client.request(method, path, **content)

    return asyncio.run(run())


def test_models_are_added_by_their_entry_and_removed_by_name():
    models = Models()
    done = change(models, "POST", "/admin/models", json={"model": "/x", "pin": True})
    assert (done.status_code, done.json()) == (201, {"name": "x", "state": "resident"})
    assert change(models, "DELETE", "/admin/models/org/x?timeout_s=2").status_code == 200
    assert models.calls == [("add", {"model": "/x", "pin": True}), ("remove", "org/x", 2.0)]
    for content in (b"{", b"[]", b'"x"'):
        assert change(models, "POST", "/admin/models", content=content).status_code == 400
    assert change(models, "DELETE", "/admin/models/x?timeout_s=-1").status_code == 400
    assert len(models.calls) == 2


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (ConfigError("kv_memory: no"), 400),
        (ModelLoadError("x", "no weights"), 400),
        (CapacityError("no room", needed_bytes=2, available_bytes=1), 409),
        (OrderRefused("the last"), 409),
        (InstanceDied("host", -9), 503),
    ],
)
def test_why_a_model_is_not_added_is_a_status_and_a_reason(refusal, status):
    answer = change(Models(refusal), "POST", "/admin/models", json={})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == str(refusal)
