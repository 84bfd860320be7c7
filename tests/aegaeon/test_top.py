"""`aegaeon top`: what it draws, and that it draws it from a real admin listener."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from admin_support import SmallInstance, listening
from rich.console import Console
from textual.widgets import Static
from typer.testing import CliRunner

from aegaeon import cli
from aegaeon.server.admin_client import AdminClient, AdminError
from aegaeon.server.history import Cell, History
from aegaeon.server.tables import cells_text, report
from aegaeon.server.top import Top


@pytest.fixture
def instance() -> SmallInstance:
    made = SmallInstance()
    made.work(a=6, b=4)
    return made


def text_of(renderable: Any, width: int = 120) -> str:
    out = io.StringIO()
    Console(width=width, file=out).print(renderable)
    return out.getvalue()


def drawn(history: History, width: int = 120) -> str:
    return text_of(report(history, width=width), width)


def test_one_snapshot_says_who_has_the_device_and_what_everybody_got(instance):
    history = History()
    history.add(instance.snapshot())
    text = drawn(history)
    assert "on the device: a" in text
    assert "refused 7" in text
    words = [line.split() for line in text.splitlines() if line.strip()]
    rows = {line[line[0] == "▶"]: " ".join(line) for line in words[:6]}
    assert "100.0 % of 1" in rows["a"]
    assert "/60s" in rows["a"]
    assert rows["c"].count("-") >= 4
    assert "■ a kv 2 MiB, weights 4 MiB   ■ free 0 B" in text
    assert "█" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_the_terminal(instance, width):
    history = History()
    history.add(instance.snapshot())
    assert max(map(len, drawn(history, width).splitlines())) <= width


def test_rates_are_those_of_the_last_minute(instance):
    history = History()
    history.add(instance.snapshot())
    assert history.recent("a").tokens == 0
    assert history.recent("a").on_time is None
    instance.work(a=5)
    history.add(instance.snapshot())
    recent = history.recent("a")
    assert (recent.tokens, recent.on_time, recent.requests_met) == (5, 1.0, 1)
    assert recent.tokens_per_s > 0
    assert history.recent("b").tokens == 0


def test_a_server_that_was_started_anew_has_no_past(instance):
    history = History()
    history.add(instance.snapshot())
    fresh = SmallInstance()
    history.add(fresh.snapshot())
    assert history.recent("a").tokens == 0
    assert sum(cell.step for cell in history.cells("a", 200)) == 0
    fresh.work(a=1)
    history.add(fresh.snapshot())
    assert history.recent("a").tokens == 1


def test_the_timeline_adds_up_and_shows_switches_in_their_colour():
    history = History()
    history.slice_s = 1.0
    history.state = {"now": 3.5}
    history._slices = {1: {"a": (0.0, 1.0)}, 2: {"a": (0.75, 0.25), "b": (0.0, 0.0)}}
    assert history.cells("a", 4) == [Cell(0, 0), Cell(0, 1.0), Cell(0.75, 0.25), Cell(0, 0)]
    assert history.cells("a", 2, 2) == [Cell(0, 0.5), Cell(0.375, 0.125)]
    text = cells_text(history.cells("a", 4))
    assert text.plain == " ██ "
    assert [str(span.style) for span in text.spans] == ["cyan", "cyan", "yellow", "cyan"]


async def shown(app: Top, part: str) -> str:
    return text_of(app.query_one(f"#{part}", Static).content)


async def until(app: Any, pilot: Any, part: str, text: str) -> str:
    for _ in range(200):
        content = await shown(app, part)
        if text in content:
            return content
        await pilot.pause(0.05)
    raise AssertionError(f"{part} does not show {text!r}: {content}")


def test_the_screen_follows_a_real_listener_and_survives_its_end(instance, tmp_path):
    path = tmp_path / "admin.sock"
    client = AdminClient(path)

    async def run() -> None:
        app = Top(lambda: client.events(interval_s=0.1, parts=("timeline",)))
        async with app.run_test(size=(120, 40)) as pilot:
            with listening(instance.app(), path):
                await until(app, pilot, "headline", "on the device: a")
                assert "█" in await shown(app, "memory")
                assert "100.0 % of 1" in await shown(app, "models")
                instance.work(c=3)
                await until(app, pilot, "headline", "on the device: c")
                await pilot.press("p")
                await until(app, pilot, "problem", "paused")
                instance.work(b=2)
                await pilot.pause(0.5)
                assert "on the device: c" in await shown(app, "headline")
                await pilot.press("p")
                await until(app, pilot, "headline", "on the device: b")
            await until(app, pilot, "problem", "no server listens")
            with listening(instance.app(), path):
                while "no server" in await shown(app, "problem"):
                    await pilot.pause(0.05)
                instance.work(a=1)
                await until(app, pilot, "headline", "on the device: a")
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(run())


def test_an_instance_that_does_not_answer_is_said_on_the_screen():
    async def events() -> AsyncIterator[tuple[str, Any]]:
        yield "error", {"message": "the instance does not answer"}
        raise AdminError("the server has ended")

    async def run() -> None:
        app = Top(events)
        async with app.run_test() as pilot:
            await until(app, pilot, "problem", "the server has ended")
            assert "on the device" not in await shown(app, "headline")

    asyncio.run(run())


def test_the_command_prints_one_snapshot_for_people_and_for_scripts(instance, tmp_path: Path):
    path = tmp_path / "admin.sock"
    with listening(instance.app(), path):
        done = CliRunner().invoke(cli.app, ["top", "--once", "--socket", str(path)])
        assert done.exit_code == 0, done.output
        assert "on the device: a" in done.output
        done = CliRunner().invoke(cli.app, ["top", "--json", "--socket", str(path)])
        answer = json.loads(done.stdout)
    assert answer["state"]["current"] == "a"
    assert answer["timeline"]["slices"]


def test_events_are_refused_with_the_reason(instance, tmp_path):
    path = tmp_path / "admin.sock"

    async def first(**options: Any) -> Any:
        return await anext(AdminClient(path).events(**options))

    with listening(instance.app(), path):
        event, data = asyncio.run(first(parts=("switches",)))
        assert event == "snapshot"
        assert data["switches"]
        assert "timeline" not in data
        with pytest.raises(AdminError, match="expected any of: switches, timeline"):
            asyncio.run(first(parts=("prompts",)))
