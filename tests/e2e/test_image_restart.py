"""A restart from cached images: the same tokens, without reading a checkpoint's tensors."""

import os
import shutil
from pathlib import Path

import pytest
from e2e_support import job_for, requests_for

pytestmark = pytest.mark.vllm

ARCHITECTURES = ("llama", "gemma3", "qwen3_moe")


def overwrite_tensors(model: str) -> None:
    """Zero every tensor of the checkpoint; length, header and time of change stay."""
    for path in Path(model).glob("*.safetensors"):
        times = path.stat()
        with path.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start)
            file.write(bytes(times.st_size - start))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_restart_serves_from_cached_images_until_the_checkpoint_changes(
    tiny_models, program, plain_vllm, tmp_path
):
    originals = tiny_models(*ARCHITECTURES)
    requests = requests_for(list(originals), per_model=3)
    expected = plain_vllm(originals, requests)
    models = {name: str(tmp_path / name) for name in originals}
    for name, path in originals.items():
        shutil.copytree(path, models[name])
    job = job_for(models, requests, image_cache=str(tmp_path / "cache"))
    assert program("exact", job)["rounds"] == [expected]
    images = sorted((tmp_path / "cache").iterdir())
    assert len(images) == len(models)
    before = [path.stat().st_ino for path in images]

    # The checkpoints' numbers are gone: only the images can give these tokens.
    for model in models.values():
        overwrite_tensors(model)
    assert program("exact", job)["rounds"] == [expected]
    assert [path.stat().st_ino for path in images] == before

    for model in models.values():
        for path in Path(model).glob("*.safetensors"):
            path.touch()
    assert program("exact", job)["rounds"] != [expected]
