"""Checkpoints of one or several files: which are read, and what an index has to be true about."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import aegaeon_kernels as ak
from aegaeon_kernels.safetensors_file import INDEX_NAME, parse_index


def write(folder: Path, name: str, *tensors: str) -> Path:
    save_file({tensor: np.arange(3, dtype=np.uint8) for tensor in tensors}, folder / name)
    return folder / name


def write_index(folder: Path, weight_map: Any) -> Path:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / INDEX_NAME


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path, A, "a", "b")
    write(tmp_path, B, "c")
    write_index(tmp_path, {"a": A, "b": A, "c": B})
    return tmp_path


def names(checkpoint: ak.Checkpoint) -> list[str]:
    return sorted(checkpoint.tensors)


def test_a_tensor_says_where_it_is(sharded: Path) -> None:
    checkpoint = ak.Checkpoint.open(sharded)
    assert [file.path.name for file in checkpoint.files] == [A, B]
    assert checkpoint.size_bytes == 9
    for name, file_idx in {"a": 0, "b": 0, "c": 1}.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.file_idx, tensor.dtype, tensor.shape) == (file_idx, "U8", (3,))
        data = checkpoint.files[file_idx].path.read_bytes()
        assert data[tensor.offset_bytes :][: tensor.size_bytes] == bytes([0, 1, 2])
    assert ak.Checkpoint.open(checkpoint) is checkpoint


def test_which_files_of_a_folder_are_read(tmp_path: Path) -> None:
    with pytest.raises(ak.IntegrityError, match=f"{tmp_path} has no safetensors files"):
        ak.Checkpoint.open(tmp_path)
    write(tmp_path, "one.safetensors", "a")
    write(tmp_path, "two.safetensors", "b")
    assert names(ak.Checkpoint.open(tmp_path)) == ["a", "b"]
    write(tmp_path, "model.safetensors", "a", "m")
    assert names(ak.Checkpoint.open(tmp_path)) == ["a", "m"]
    write_index(tmp_path, {"b": "two.safetensors"})
    assert names(ak.Checkpoint.open(tmp_path)) == ["b"]
    assert names(ak.Checkpoint.open(tmp_path / "one.safetensors")) == ["a"]
    assert names(ak.Checkpoint.open(str(tmp_path / "one.safetensors"))) == ["a"]


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    write(sharded, B, "c", "a")
    with pytest.raises(ak.IntegrityError, match=f"'a' is in {sharded / B} and in {sharded / A}"):
        ak.Checkpoint.open(sharded)


def test_missing_shards_are_named(sharded: Path) -> None:
    write_index(sharded, {"a": A, "x": "x.safetensors", "y": "y.safetensors"})
    with pytest.raises(
        ak.IntegrityError, match=r"2 of 3 shards are missing: x.safetensors, y.safetensors$"
    ):
        ak.Checkpoint.open(sharded)


def test_a_folder_is_no_shard(sharded: Path) -> None:
    (sharded / "x.safetensors").mkdir()
    write_index(sharded, {"a": "x.safetensors"})
    with pytest.raises(ak.IntegrityError, match=r"missing: x.safetensors"):
        ak.Checkpoint.open(sharded)


def test_tensors_that_are_not_where_the_index_says(sharded: Path) -> None:
    write_index(sharded, {"a": B, "b": A, "c": B, "d": A})
    with pytest.raises(
        ak.IntegrityError, match=f"2 tensors are not where it says: 'a' in {B}, 'd' in {A}$"
    ):
        ak.Checkpoint.open(sharded)
    write_index(sharded, {"c": B})  # what it does not mention does no harm
    assert names(ak.Checkpoint.open(sharded)) == ["c"]


def test_a_long_list_in_a_message_is_cut(sharded: Path) -> None:
    write_index(sharded, {f"t{i}": A for i in range(30)})
    with pytest.raises(ak.IntegrityError, match=r"30 tensors .*'t7' in [^']*, \.\.\.$"):
        ak.Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff{}", "codec can't decode"),
        (b"[]", "an index is an object with a 'weight_map'"),
        (b"{}", "with a 'weight_map'"),
        (b'{"weight_map":{}}', "with a 'weight_map'"),
        (b'{"weight_map":["a"]}', "with a 'weight_map'"),
        (b'{"weight_map":{"a":1}}', "has 1 for 'a', which is not the name"),
        (b'{"weight_map":{"a":"../x.safetensors"}}', "has '../x.safetensors' for 'a'"),
        (b'{"weight_map":{"a":"/x.safetensors"}}', "has '/x.safetensors' for 'a'"),
        (b'{"weight_map":{"a":"x.bin"}}', "has 'x.bin' for 'a'"),
        (b'{"weight_map":{"a":"x\\u0000.safetensors"}}', "which is not the name"),
        (b'{"weight_map":{"a":"\\ud800.safetensors"}}', "which is not the name"),
        (b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "'a' occurs twice"),
        (b'{"weight_map":{},"weight_map":{}}', "'weight_map' occurs twice"),
        (b'{"weight_map":NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_index_is_refused(sharded: Path, index: bytes, message: str) -> None:
    (sharded / INDEX_NAME).write_bytes(index)
    with pytest.raises(ak.IntegrityError, match=f"{INDEX_NAME}: .*{message}"):
        ak.Checkpoint.open(sharded)
    with pytest.raises(ValueError, match=message):
        parse_index(index)


def test_what_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    for path in (tmp_path / "x", tmp_path / "x.safetensors", tmp_path / INDEX_NAME):
        with pytest.raises(FileNotFoundError):
            ak.Checkpoint.open(path)
    with pytest.raises(ValueError, match="at least one file"):
        ak.Checkpoint.open([])


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(ak.IntegrityError, match="not a file"):
        ak.Checkpoint.open(tmp_path / "m.safetensors")


def test_a_name_of_bytes_that_are_no_text_is_opened(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    Path(path).write_bytes(write(tmp_path, "m.safetensors", "a").read_bytes())
    assert names(ak.Checkpoint.open(path)) == ["a"]
