"""How the command line finds the server that is meant."""

import os
import socket
import tempfile
from pathlib import Path

import pytest
from admin_support import SmallInstance, listening

from aegaeon import cli
from aegaeon.server.admin_client import AdminClient, AdminError, find_admin_socket


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where running servers leave their sockets, for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def server_folder(folder: Path, name: str) -> Path:
    made = folder / f"aegaeon-{name}"
    made.mkdir()
    return made / "admin.sock"


def abandoned(path: Path) -> Path:
    """The socket of a server that was killed."""
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    return path


def test_without_a_server_the_message_says_how_to_start_or_name_one(folder):
    with pytest.raises(AdminError, match="no running server") as caught:
        find_admin_socket()
    assert "aegaeon serve" in str(caught.value)
    assert "--pool" in str(caught.value)


def test_the_one_that_runs_is_found_beside_what_others_left_behind(folder):
    abandoned(server_folder(folder, "killed"))
    server_folder(folder, "starting")  # its socket is not there yet
    path = server_folder(folder, "running")
    with listening(SmallInstance().app(), path):
        assert find_admin_socket() == path
        state = AdminClient(find_admin_socket()).get("/admin/state")
    assert [model["name"] for model in state["models"]] == ["a", "b", "c"]


def test_of_several_the_user_must_choose(folder):
    paths = [server_folder(folder, name) for name in ("one", "two")]
    with listening(SmallInstance().app(), paths[0]), listening(SmallInstance().app(), paths[1]):
        with pytest.raises(AdminError, match="--socket") as caught:
            find_admin_socket()
        assert all(str(path) in str(caught.value) for path in paths)


def test_a_folder_of_somebody_else_is_not_believed(folder, monkeypatch):
    path = server_folder(folder, "foreign")
    with listening(SmallInstance().app(), path):
        monkeypatch.setattr(os, "getuid", lambda: path.parent.stat().st_uid + 1)
        with pytest.raises(AdminError, match="no running server"):
            find_admin_socket()


def test_a_socket_that_nobody_answers_is_named(tmp_path):
    path = abandoned(tmp_path / "old.sock")
    with pytest.raises(AdminError, match=f"no server listens on {path}"):
        AdminClient(path).get("/admin/state")


@pytest.mark.parametrize(("named", "expected"), [("here.sock", "here.sock"), ("auto", None)])
def test_a_pool_file_names_its_server(folder, named, expected):
    (folder / "model").mkdir()
    pool = folder / "pool.yaml"
    pool.write_text(f"models:\n  - model: {folder}/model\nadmin:\n  socket: {named}\n")
    found = server_folder(folder, "running")
    path = found if expected is None else folder / expected
    with listening(SmallInstance().app(), path):
        state = cli._admin(pool, None).get("/admin/state")
    assert state["current"] is None


def test_a_socket_that_is_given_wins(folder):
    path = server_folder(folder, "given")
    with listening(SmallInstance().app(), path):
        assert cli._admin(Path("no such pool.yaml"), path).get("/admin/state")["models"]
