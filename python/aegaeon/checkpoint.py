"""Checks a checkpoint's files before any process is started for it.

Reads the index, and the headers of the safetensors files only, through the safetensors library,
which checks them against the length of the file: a truncated file or an altered header is found
here, by name.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from aegaeon.core.errors import ModelLoadError
from aegaeon_kernels.errors import IntegrityError
from aegaeon_kernels.safetensors_file import INDEX_NAME, read_index


def weight_bytes(model: str, path: Path) -> int:
    """Bytes of all tensors of the checkpoint in `path`, as stored.

    Raises ModelLoadError, naming the file, for a missing, truncated or altered one, and for a
    checkpoint without safetensors weights.
    """
    if not (path / "config.json").is_file():
        raise ModelLoadError(model, f"{path} has no config.json")
    total = 0
    for file in _weight_files(model, path):
        total += _tensor_bytes(model, file)
    return total


def _weight_files(model: str, path: Path) -> list[Path]:
    index = path / INDEX_NAME
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelLoadError(model, f"{path} has no safetensors weights (nothing else is read)")
        return files
    try:
        shards = set(read_index(index).values())
    except IntegrityError as error:
        raise ModelLoadError(model, str(error)) from error
    return [path / shard for shard in sorted(shards)]


def _tensor_bytes(model: str, file: Path) -> int:
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(model, f"{file} is truncated or altered: {error}") from error
    if not names:
        raise ModelLoadError(model, f"{file} has no tensors")
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header_bytes
