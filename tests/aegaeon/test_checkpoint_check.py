"""What is asked of a checkpoint's files before a process is started for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from aegaeon.checkpoint import weight_bytes
from aegaeon.core.errors import ModelLoadError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros(7, np.uint8)}, tmp_path / "a.safetensors")
    save_file({"b": np.zeros(5, np.uint8)}, tmp_path / "b.safetensors")
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_the_shards_of_the_index_are_counted(folder: Path) -> None:
    assert weight_bytes("m", folder) == 12
    write_index(folder, {"a": "a.safetensors"})
    assert weight_bytes("m", folder) == 7


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../a.safetensors"}, "not the name of a"),
        ({"a": "c.safetensors"}, "1 of 1 shards are missing: c.safetensors"),
        ({"a": 1}, "not the name of a"),
        ([], "'weight_map' of names to files"),
    ],
)
def test_a_damaged_index_is_refused_with_its_name(
    folder: Path, weight_map: object, message: str
) -> None:
    write_index(folder, weight_map)
    with pytest.raises(ModelLoadError, match=message) as caught:
        weight_bytes("m", folder)
    assert "model.safetensors.index.json" in str(caught.value)
