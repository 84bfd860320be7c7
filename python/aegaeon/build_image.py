"""Builds the image file of a checkpoint, with progress bars: what `aegaeon image` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import aegaeon_kernels as ak
from aegaeon.core.errors import AegaeonError, ModelLoadError


@dataclass(frozen=True)
class BuiltImage:
    """What was built; seconds of the parts."""

    path: str
    size_bytes: int
    num_files: int
    num_tensors: int
    num_layers: int
    read_s: float
    write_s: float
    verify_s: float | None


def build_image(
    model_dir: Path, out: Path, *, verify: bool = False, num_threads: int | None = None
) -> BuiltImage:
    """Read the safetensors files of `model_dir` into an image and save it as `out`.

    The whole image is in memory meanwhile. `out` appears when it is complete, in place of a file of
    that name. verify: open `out`, check its checksums, and compare every tensor with the files.
    Progress bars go to stderr when it is a terminal.

    Raises ModelLoadError for files that are missing, damaged or no model; AegaeonError when the
    image cannot be written, or is not what was read; ValueError for a checkpoint without bytes.
    """
    started = time.monotonic()
    try:
        checkpoint = ak.Checkpoint.open(model_dir)
        layout = ak.ImageLayout.build(checkpoint.tensors.values())
        with _bar("reading", model_dir.name) as on_progress:
            image = ak.fill_from_safetensors(
                None,
                checkpoint,
                layout=layout,
                name=model_dir.name,
                num_threads=num_threads,
                on_progress=on_progress,
            )
    except (ak.Error, OSError) as error:
        raise ModelLoadError(model_dir.name, str(error)) from error
    filled = time.monotonic()
    try:
        with _bar("writing", out.name) as on_progress:
            image.save(out, num_threads=num_threads, on_progress=on_progress)
    except OSError as error:
        raise AegaeonError(f"the image cannot be written: {error}") from error
    del image  # its memory is wanted for the second one
    saved = time.monotonic()
    if verify:
        _verify(out, checkpoint, num_threads)
    return BuiltImage(
        path=str(out),
        size_bytes=layout.size_bytes,
        num_files=len(checkpoint.files),
        num_tensors=len(layout.tensors),
        num_layers=len(layout.layers),
        read_s=filled - started,
        write_s=saved - filled,
        verify_s=time.monotonic() - saved if verify else None,
    )


def _verify(out: Path, checkpoint: ak.Checkpoint, num_threads: int | None) -> None:
    try:
        with _bar("opening", out.name) as on_progress:
            image = ak.HostImage.open(out, num_threads=num_threads, on_progress=on_progress)
        with _bar("comparing", out.name) as on_progress:
            ak.compare_with_safetensors(
                image, checkpoint, num_threads=num_threads, on_progress=on_progress
            )
    except (ak.Error, OSError) as error:
        raise AegaeonError(f"{out} is not what was read: {error}") from error


@contextmanager
def _bar(action: str, name: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(
        desc=f"{action} {name}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None,  # unless stderr is a terminal
        leave=False,
    ) as bar:

        def on_progress(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        yield on_progress
