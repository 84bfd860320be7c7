"""`aegaeon image`: a checkpoint becomes an image file, or one line that says why not."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import aegaeon_kernels as ak
from aegaeon.build_image import build_image
from aegaeon.core.errors import AegaeonError, ModelLoadError
from aegaeon.tiny_model import write_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model("llama", tmp_path / "tiny-llama")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aegaeon", "image", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_image_holds_the_checkpoint(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "llama.image"
    done = run(model, out, "--verify", "--json", "--threads", "2")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    tensors = load_file(model / "model.safetensors")
    image = ak.HostImage.open(out)
    layout = ak.ImageLayout.from_json(image.layout_json)
    assert figures["size_bytes"] == image.size_bytes == layout.size_bytes
    assert (figures["num_tensors"], figures["num_layers"]) == (len(tensors), 4 + 3)
    assert min(figures["read_s"], figures["write_s"], figures["verify_s"]) > 0
    for name, expected in tensors.items():
        assert torch.equal(layout.tensor(image, name), expected), name


def test_the_figures_are_for_people_too(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "out", "--verify")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path / 'out'}: ")
    assert "the same as the checkpoint" in done.stdout
    assert "the same" not in run(model, tmp_path / "out").stdout


def test_a_terminal_sees_a_bar(model: Path, tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 80))
    command = [sys.executable, "-m", "aegaeon", "image", str(model), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=its_end) as process:
        os.close(its_end)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:  # its last holder has closed it
                break
            shown += part
    os.close(terminal)
    assert process.returncode == 0
    assert b"reading tiny-llama" in shown
    assert b"writing out" in shown


def test_a_damaged_checkpoint_is_named(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    done = run(model, tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"aegaeon: model 'tiny-llama' cannot be loaded: {file}: ")
    assert "the tensors end at byte" in done.stderr
    assert not (tmp_path / "out").exists()


def test_errors_are_ours(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="No such file"):
        build_image(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ModelLoadError, match="has no safetensors files"):
        build_image(tmp_path, tmp_path / "out")
    with pytest.raises(AegaeonError, match=r"the image cannot be written: .*No such file"):
        build_image(model, tmp_path / "none" / "out")


def test_an_image_that_is_not_what_was_read_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody spoils the file between writing and verifying."""
    save = ak.HostImage.save

    def save_and_spoil(self: ak.HostImage, path: Path, **options: object) -> None:
        save(self, path, **options)
        with path.open("r+b") as file:
            file.write(b"spoilt")

    monkeypatch.setattr(ak.HostImage, "save", save_and_spoil)
    with pytest.raises(AegaeonError, match=r"out is not what was read: .*chunk 0"):
        build_image(model, tmp_path / "out", verify=True)
