"""The key of a model's weights image: equal only when vLLM would make the very same bytes of it."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Raise it when weights are placed in another way.
PLACEMENT_FORMAT = 1


def image_key(vllm_config: Any, *, device_kind: str) -> str | None:
    """Of the checkpoint's files, vLLM's configuration, and the versions that matter.

    A file counts by name, length, time of change and, for safetensors, its header: changed bytes
    under an unchanged time and length are not noticed, as by make.

    None when images of the model cannot be used again: a name in the hub cache instead of a
    directory; a quantised model, some of which keep numbers computed from weights outside tensors.
    """
    model = vllm_config.model_config
    folder = Path(model.model)
    if model.quantization is not None or not folder.is_dir():
        return None
    parts = {
        "placement": PLACEMENT_FORMAT,
        "vllm": vllm_config.compute_hash(),
        "versions": [version("aegaeon-kernels"), _vllm_version(), torch.__version__],
        "device": device_kind,
        "gpu": torch.cuda.get_device_capability() if device_kind == "cuda" else None,
        "dtype": str(model.dtype),
        "rank": vllm_config.parallel_config.rank,
        "files": list(_files(folder)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def _files(folder: Path) -> Iterator[tuple[str, int, int, str]]:
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        status = path.stat()
        content = _header(path) if path.suffix == ".safetensors" else path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        yield path.name, status.st_size, status.st_mtime_ns, digest


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
