"""API keys: made, kept as hashes, read again; and the application that asks for them always."""

import asyncio
import hashlib
import logging
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from aegaeon.core.config import load_pool
from aegaeon.core.errors import ConfigError
from aegaeon.pool_check import check_pool, is_loopback
from aegaeon.server.auth import ApiKeys, WithKey, add_key
from aegaeon.watched_files import watch_files


def test_a_new_key_is_let_in_and_is_not_in_its_file(tmp_path):
    file = tmp_path / "keys"
    first, second = add_key(file, "alice"), add_key(file, "bob@example")
    assert len(first) >= 40
    text = file.read_text()
    assert first not in text
    assert second not in text
    assert file.stat().st_mode & 0o777 == 0o600
    keys = ApiKeys(file)
    assert all(keys.allow(f"Bearer {key}") for key in (first, second))
    assert not keys.allow(f"Bearer {first}x")
    assert not keys.allow(f"Bearer {hashlib.sha256(first.encode()).hexdigest()}")
    assert not keys.allow("Bearer ")
    assert not keys.allow("Bearer \u00fc\u1234")


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "x" * 65])
def test_a_name_that_does_not_fit_on_the_line_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name"):
        add_key(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("line", ["my-secret-key", "sha256:abc", "sha256:" + "g" * 64])
def test_a_line_that_is_no_hash_is_refused_without_being_shown(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{line}\n")
    with pytest.raises(ConfigError, match="keys:2") as caught:
        ApiKeys(file)
    assert line not in str(caught.value)
    with pytest.raises(ConfigError):
        add_key(file, "alice")


def test_a_keys_file_without_keys_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="no API key"):
        ApiKeys(file)


def test_a_file_that_changes_is_read_again_and_a_bad_one_changes_nothing(tmp_path, caplog):
    file = tmp_path / "keys"
    old = add_key(file, "old")
    keys = ApiKeys(file)

    async def run() -> str:
        watching = asyncio.create_task(watch_files({file: keys.reload}))
        await asyncio.sleep(0.3)
        replacement = tmp_path / "next"
        new = add_key(replacement, "new")
        replacement.replace(file)  # as an editor or a mount of secrets does it
        await until(lambda: keys.allow(f"Bearer {new}"))
        assert not keys.allow(f"Bearer {old}")
        file.write_text("half a li")
        await until(lambda: "stay as they were" in caplog.text)
        assert keys.allow(f"Bearer {new}")
        watching.cancel()
        return new

    with caplog.at_level(logging.INFO):
        new = asyncio.run(run())
    assert "the key 'new' is accepted now" in caplog.text
    assert "the key 'old' is not accepted any more" in caplog.text
    assert new not in caplog.text


def test_a_keys_file_that_is_no_text_is_refused_without_being_shown(tmp_path):
    file = tmp_path / "keys"
    key = add_key(file, "alice")
    file.write_bytes(file.read_bytes() + b"# s\xe9cret\n")
    with pytest.raises(ConfigError, match="keys: not UTF-8 text") as caught:
        ApiKeys(file)
    assert "cret" not in repr(caught.value.__cause__) + str(caught.value)
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        add_key(file, "bob")
    assert key not in str(caught.value)


def test_a_name_in_utf_8_is_read_whatever_the_locale_is(tmp_path):
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"a key").hexdigest()
    file.write_bytes(f"sha256:{digest} zo\u00eb\n".encode())
    assert ApiKeys(file).allow("Bearer a key")


def test_a_new_key_gets_a_line_of_its_own_behind_one_without_end(tmp_path):
    file = tmp_path / "keys"
    first = add_key(file, "first")
    file.write_text(file.read_text().rstrip())
    second = add_key(file, "second")
    keys = ApiKeys(file)
    assert keys.allow(f"Bearer {first}")
    assert keys.allow(f"Bearer {second}")


def test_a_file_that_is_no_text_changes_nothing_and_later_changes_are_seen(tmp_path, caplog):
    file = tmp_path / "keys"
    old = add_key(file, "old")
    keys = ApiKeys(file)

    async def run() -> None:
        watching = asyncio.create_task(watch_files({file: keys.reload}))
        await asyncio.sleep(0.3)
        file.write_bytes(b"\xff")
        await until(lambda: "stay as they were" in caplog.text)
        assert keys.allow(f"Bearer {old}")
        file.unlink()
        new = add_key(file, "new")
        await until(lambda: keys.allow(f"Bearer {new}"))
        watching.cancel()

    asyncio.run(run())


def test_what_has_changed_before_the_watch_begins_is_seen(tmp_path):
    file = tmp_path / "keys"
    old = add_key(file, "old")
    keys = ApiKeys(file)
    file.unlink()
    new = add_key(file, "new")  # as while models are loaded

    async def run() -> None:
        watching = asyncio.create_task(watch_files({file: keys.reload}))
        await until(lambda: keys.allow(f"Bearer {new}"))
        watching.cancel()

    asyncio.run(run())
    assert not keys.allow(f"Bearer {old}")


def test_a_function_that_raises_does_not_end_the_watch(tmp_path, caplog):
    bad, good = tmp_path / "bad", tmp_path / "good"
    seen: list[str] = []

    def fail() -> None:
        seen.append(bad.read_text())
        raise RuntimeError("on purpose")

    async def run() -> None:
        for file in (bad, good):
            file.write_text("1")
        files = {bad: fail, good: lambda: seen.append("good " + good.read_text())}
        watching = asyncio.create_task(watch_files(files))
        await until(lambda: "good 1" in seen)
        await asyncio.sleep(0.3)
        for file in (bad, good):
            file.write_text("2")
        await until(lambda: "2" in seen and "good 2" in seen)
        watching.cancel()

    asyncio.run(run())
    assert "bad has changed and could not be taken on" in caplog.text
    assert "on purpose" in caplog.text


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("path", ["/", "/health", "/nowhere"])
def test_with_a_key_means_every_route(tmp_path, path):
    file = tmp_path / "keys"
    key = add_key(file, "admin")

    async def answer(request):
        return PlainTextResponse("fine")

    app = WithKey(Starlette(routes=[Route("/", answer)]), ApiKeys(file))

    async def ask(header: dict[str, str]) -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            return (await client.get(path, headers=header)).status_code

    assert asyncio.run(ask({})) == 401
    assert asyncio.run(ask({"authorization": "Bearer no"})) == 401
    expected = 200 if path == "/" else 404
    assert asyncio.run(ask({"authorization": f"Bearer {key}"})) == expected


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *[("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)],
        *[("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("no-such-host.invalid", False)],
    ],
)
def test_what_other_machines_can_reach_is_known(host, loopback):
    assert is_loopback(host) is loopback


def pool_file(folder: Path, more: str) -> Path:
    (folder / "model").mkdir()
    file = folder / "pool.yaml"
    file.write_text(f"device: host\nmodels: [{{model: model}}]\n{more}\n")
    return file


def test_an_address_for_other_machines_needs_keys(tmp_path):
    pool = load_pool(pool_file(tmp_path, "server: {host: 0.0.0.0}"))
    with pytest.raises(ConfigError, match=r"set server\.api_keys_file"):
        check_pool(pool)


def test_an_admin_port_needs_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"admin\.port: a port needs admin\.keys_file"):
        load_pool(pool_file(tmp_path, "admin: {port: 9000}"))
