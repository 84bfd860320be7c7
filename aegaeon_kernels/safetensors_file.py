"""Safetensors files: which tensors they hold and where, found valid before anything is believed.

Reads headers only; the bytes are read by fill_from_safetensors(). Needs neither torch nor the
safetensors package.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from aegaeon_kernels import _C
from aegaeon_kernels.errors import IntegrityError

# By the names that safetensors files use, bits per element.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(_C.SAFETENSORS_DTYPE_BITS)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = _C.MAX_SAFETENSORS_HEADER_BYTES
MAX_NAMED = 8  # in one message

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file. Elements are little-endian, the last axis contiguous."""

    name: str
    dtype: str  # one of DTYPE_BITS
    shape: tuple[int, ...]
    file_idx: int  # in Checkpoint.files
    offset_bytes: int  # from the start of the file
    size_bytes: int


class SafetensorsFile:
    """One file, kept open: what is read later is from the file whose header was checked.

    Exactly the files that the reference implementation (the Rust crate safetensors 0.8) accepts are
    accepted. Its rules: 8 bytes of length, little-endian; a header of at most 100 MB of JSON in
    UTF-8; known dtypes; unsigned shapes and offsets; every tensor of the size that its shape says,
    one behind the other without holes or overlap, up to the end of the file; metadata of str to
    str; no field twice. A tensor's name that occurs twice it does accept, and the last one counts.

    Raises OSError, and IntegrityError, which says what is wrong and where.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        self._file = _C.SafetensorsFile(os.fsencode(path))
        header_bytes, tensors, metadata = self._file.header
        self.size_bytes = self._file.size_bytes
        self.metadata: Mapping[str, str] = MappingProxyType(metadata or {})
        self._tensors = tensors
        self._data_offset = 8 + header_bytes

    def tensors(self, file_idx: int = 0) -> Iterator[StoredTensor]:
        """All of them, in the order of their bytes."""
        for name, dtype, shape, begin, end in self._tensors:
            yield StoredTensor(name, dtype, shape, file_idx, self._data_offset + begin, end - begin)

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r}, {len(self._tensors)} tensors)"


class Checkpoint:
    """The tensors of one or several safetensors files, which stay open as long as it lives.

    files:   as given; the shards of an index by name.
    tensors: by name, file by file in the order of their bytes.
    """

    def __init__(self, files: Iterable[StrPath]) -> None:
        """Raises OSError; IntegrityError: a bad header, a name in two files; ValueError: none."""
        self.files: tuple[SafetensorsFile, ...] = tuple(SafetensorsFile(path) for path in files)
        if not self.files:
            raise ValueError("a checkpoint has at least one file")
        tensors: dict[str, StoredTensor] = {}
        for idx, file in enumerate(self.files):
            for tensor in file.tensors(idx):
                if tensor.name in tensors:
                    other = self.files[tensors[tensor.name].file_idx]
                    raise IntegrityError(
                        f"tensor {tensor.name!r} is in {file.path} and in {other.path}"
                    )
                tensors[tensor.name] = tensor
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    @classmethod
    def open(cls, source: Checkpoint | StrPath | Sequence[StrPath]) -> Checkpoint:
        """A checkpoint from what a caller has.

        source: a file; several; an index (model.safetensors.index.json), whose shards stand beside
                it; a folder, in which that is the index if there is one, else model.safetensors,
                else all *.safetensors; or a checkpoint, returned as it is.
        Raises OSError, and IntegrityError: for what the files get it for, a damaged index, shards
        that are missing, tensors that are not where the index says.
        """
        if isinstance(source, Checkpoint):
            return source
        if not isinstance(source, (str, os.PathLike)):
            return cls(source)
        path = Path(source)
        if stat.S_ISDIR(path.stat().st_mode):
            path = _weights_in(path)
            if path.is_dir():
                return cls(sorted(path.glob("*.safetensors")))
        if path.suffix != ".json":
            return cls([path])
        weight_map = read_index(path)
        checkpoint = cls(path.parent / shard for shard in sorted(set(weight_map.values())))
        checkpoint._require(weight_map, path)
        return checkpoint

    def _require(self, weight_map: Mapping[str, str], index: Path) -> None:
        """Every tensor is where the index says. Those it does not mention do no harm."""
        where = {name: self.files[at.file_idx].path.name for name, at in self.tensors.items()}
        absent = [
            f"{name!r} in {shard}" for name, shard in weight_map.items() if where.get(name) != shard
        ]
        if absent:
            raise IntegrityError(
                f"{index}: {len(absent)} tensors are not where it says: {some(absent)}"
            )

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def __repr__(self) -> str:
        return f"Checkpoint({len(self.files)} files, {len(self.tensors)} tensors)"


def read_index(path: StrPath) -> dict[str, str]:
    """The weight map of an index: tensor name to shard, a file beside the index that is there.

    Raises OSError, and IntegrityError: not JSON, a name twice, a shard that is no plain file name
    or is missing.
    """
    path = Path(path)
    with path.open("rb") as file:
        encoded = file.read(MAX_INDEX_BYTES + 1)
    try:
        weight_map = parse_index(encoded)
    except ValueError as error:
        raise IntegrityError(f"{path}: {error}") from None
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise IntegrityError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}"
        )
    return weight_map


def parse_index(encoded: bytes) -> dict[str, str]:
    """The weight map in the bytes of an index. Raises ValueError."""
    if len(encoded) > MAX_INDEX_BYTES:
        raise ValueError(f"an index of more than {MAX_INDEX_BYTES} bytes")
    index = parse_json(encoded)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("an index is an object with a 'weight_map' of names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise ValueError(
                f"weight_map has {shard!r} for {name!r}, which is not the name of a *.safetensors "
                "file beside it"
            )
    return weight_map


def parse_json(encoded: bytes) -> Any:
    """JSON by the standard: UTF-8, no NaN, no name twice. Raises ValueError."""
    try:
        return json.loads(
            encoded.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice in one JSON object")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and name.isprintable()


def _weights_in(folder: Path) -> Path:
    """The index or the one file to read, or the folder itself for all its files."""
    for name in (INDEX_NAME, SINGLE_NAME):
        if (folder / name).is_file():
            return folder / name
    if not any(folder.glob("*.safetensors")):
        raise IntegrityError(f"{folder} has no safetensors files")
    return folder


def some(names: Sequence[str]) -> str:
    """The first few, for a message."""
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
