"""The dashboard: what is served, under which policy, through which door, and that it draws."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from admin_support import SmallInstance, listening, listening_on_loopback

from aegaeon.server.admin import admin_app
from aegaeon.server.bridge import bridge_app, new_key
from aegaeon.server.dashboard import PAGE


def ask(app: Any, *paths: str, host: str = "127.0.0.1:1", **options: Any) -> list[httpx.Response]:
    """GET each, with one client that keeps its cookies."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        base_url = f"http://{host}"
        async with httpx.AsyncClient(transport=transport, base_url=base_url, **options) as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(run())


def test_the_page_is_served_with_a_policy_that_allows_its_own_parts_only():
    (page,) = ask(SmallInstance().app(), "/dashboard")
    assert page.status_code == 200
    policy = dict(
        part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        bodies = re.findall(rf"<{kind}>(.*?)</{kind}>", page.text, re.DOTALL)
        assert len(bodies) == 1
        digest = base64.b64encode(hashlib.sha256(bodies[0].encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert page.headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_nothing_from_elsewhere_and_makes_no_markup_from_data():
    text = PAGE.read_text().replace('href="data:,"', "")  # no icon, so that none is asked for
    assert not re.search(
        r"(?:https?:)?//[a-z]", re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.M)
    )
    assert not re.search(r"\b(src|href|action|style|on\w+)=\"", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text
    )


def test_what_the_page_reads_is_in_what_the_server_sends():
    """Every property of the state that the script names."""
    instance = SmallInstance()
    instance.work(a=2, b=2)
    snapshot = instance.snapshot()
    keys: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            keys.update(value)
            for each in value.values():
                collect(each)
        elif isinstance(value, list):
            for each in value:
                collect(each)

    collect(json.loads(json.dumps(snapshot)))
    text = PAGE.read_text()
    read = set(
        re.findall(r"\b(?:state|model|slo|arena|held|next|each|fresh|old)\.([a-z_0-9]+)", text)
    )
    read |= {"p50", "p99", "bytes_in", "bytes_out", "failed", "recomputed_requests"}
    assert read - keys - {"map", "reduce", "forEach", "open"} == set()


def test_a_browser_gets_in_by_the_printed_address_alone(tmp_path):
    path, key = tmp_path / "admin.sock", new_key()
    instance = SmallInstance()
    instance.work(a=2)
    bridge = bridge_app(path, key)
    with listening(instance.app(), path):
        for url in ("/dashboard", "/dashboard?key=wrong", "/admin/state", "/admin/events"):
            assert ask(bridge, url)[0].status_code == 401
        door, page, state, timeline = ask(
            bridge, f"/dashboard?key={key}", "/dashboard", "/admin/state", "/admin/timeline"
        )
    assert (door.status_code, door.headers["location"]) == (303, "/dashboard")
    assert "HttpOnly" in door.headers["set-cookie"]
    assert "SameSite=strict" in door.headers["set-cookie"]
    assert page.text == PAGE.read_text()
    assert state.json()["current"] == "a"
    assert timeline.json()["slices"]


def test_the_door_is_not_opened_under_a_foreign_name_nor_for_orders(tmp_path):
    path, key = tmp_path / "admin.sock", new_key()
    bridge = bridge_app(path, key)
    url = f"/dashboard?key={key}"
    assert ask(bridge, url, host="evil.example:80")[0].status_code == 400
    _, order, sleep = ask(bridge, url, "/admin/models/a/unload", "/is_sleeping?model=a")
    assert (order.status_code, sleep.status_code) == (404, 404)
    _, gone = ask(bridge, url, "/admin/state")
    assert gone.status_code == 502

    async def post() -> int:
        transport = httpx.ASGITransport(bridge)
        cookies = {"aegaeon-dashboard": key}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost:1", cookies=cookies
        ) as client:
            return (await client.post("/admin/models/a/unload")).status_code

    assert asyncio.run(post()) == 404


def test_an_instance_that_is_gone_leaves_the_page_served():
    async def gone(question: str, **arguments: Any) -> Any:
        raise TimeoutError

    page, state = ask(admin_app(gone), "/dashboard", "/admin/state")
    assert (page.status_code, state.status_code) == (200, 503)


def test_open_streams_end_when_the_listener_closes(tmp_path):
    """Both of the admin listener and of the door: a browser would keep its own open for ever."""
    path, key = tmp_path / "admin.sock", new_key()
    instance = SmallInstance()

    async def stream(app: Any, closing: asyncio.Event, **options: Any) -> float:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost:1", **options
        ) as client:
            # The transport gives an answer when it is complete: the stream has ended.
            asking = asyncio.ensure_future(client.get("/admin/events?interval_s=60"))
            await asyncio.sleep(0.5)
            assert not asking.done()
            began = time.monotonic()
            closing.set()
            answer = await asyncio.wait_for(asking, 20)
            assert answer.text.startswith("event: snapshot")
            return time.monotonic() - began

    async def run() -> None:
        closing = asyncio.Event()
        assert await stream(instance.app(closing), closing) < 10
        with listening(instance.app(), path):
            door_closing = asyncio.Event()
            door = bridge_app(path, key, closing=door_closing)
            cookies = {"aegaeon-dashboard": key}
            assert await stream(door, door_closing, cookies=cookies) < 10

    asyncio.run(run())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENS = {
    "desktop-light": {"width": 1200, "height": 900, "scheme": "light"},
    "phone-dark": {"width": 390, "height": 844, "scheme": "dark"},
}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("screen", SCREENS)
def test_a_real_browser_draws_it_without_an_error_on_desktop_and_phone(screen, tmp_path: Path):
    sync_api = pytest.importorskip("playwright.sync_api")
    path, key = tmp_path / "admin.sock", new_key()
    instance = SmallInstance()
    instance.work(a=40, b=30, c=20)
    settings = SCREENS[screen]
    problems: list[str] = []
    with (
        listening(instance.app(), path),
        listening_on_loopback(bridge_app(path, key)) as port,
        sync_api.sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": settings["width"], "height": settings["height"]},
            color_scheme=settings["scheme"],
        )
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/dashboard?key={key}")
        sync_api.expect(page.locator("#models tr")).to_have_count(3)
        sync_api.expect(page.locator("#holder")).to_have_text(str(instance.switcher.current))
        instance.work(c=25, a=10)
        sync_api.expect(page.locator("#holder")).to_have_text("c")
        widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1]
        ink = page.evaluate(
            "(() => { const c = document.getElementById('timeline'); return c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.some((value) => value > 0); })()"
        )
        assert ink
        page.screenshot(path=tmp_path / f"{screen}.png", full_page=True)
        browser.close()
    assert problems == []
