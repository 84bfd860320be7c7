"""Filling images: what ends it, and what is refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fill_support import (
    assert_holds,
)
from kernel_support import MIB
from safetensors.torch import save_file

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.image_layout import PlacedTensor


class Changed:
    """An image filled from a checkpoint that somebody treats badly after it was opened."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.checkpoint = ak.Checkpoint.open(file)
        self.layout = ak.ImageLayout.build(self.checkpoint.tensors.values())
        self.image = ak.HostImage.allocate(self.layout.size_bytes)

    def fill(self, num_threads: int) -> None:
        ak.fill_from_safetensors(
            self.image, self.checkpoint, layout=self.layout, num_threads=num_threads
        )


@pytest.fixture
def opened(file: Path) -> Iterator[Changed]:
    changed = Changed(file)
    yield changed
    assert not changed.image.sealed
    assert changed.image.layout_json == b""


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_file_cut_short_meanwhile(opened: Changed, num_threads: int) -> None:
    os.truncate(opened.file, opened.file.stat().st_size - 1)
    with pytest.raises(ak.IntegrityError, match=rf"{opened.file}: (ends at byte|was written to)"):
        opened.fill(num_threads)


def test_a_file_written_to_meanwhile(opened: Changed) -> None:
    with opened.file.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(ak.IntegrityError, match=f"{opened.file}: was written to while it was read"):
        opened.fill(2)


def test_a_file_appended_to_meanwhile(opened: Changed) -> None:
    with opened.file.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ak.IntegrityError, match="was written to"):
        opened.fill(2)


def test_another_file_of_that_name_does_no_harm(file: Path, weights: Any) -> None:
    changed = Changed(file)
    replacement = file.with_name("new")
    save_file({"other": torch.zeros(3)}, replacement)
    replacement.rename(file)
    changed.fill(2)
    assert_holds(changed.image, weights)


FAILING_PREAD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The n-th read at an offset fails with PREAD_ERRNO, or (0) reads PREAD_SHORT bytes at most. */
static atomic_int num_calls;
ssize_t pread(int fd, void* data, size_t bytes, off_t offset) {
  static ssize_t (*real)(int, void*, size_t, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "pread");
  int error = atoi(getenv("PREAD_ERRNO"));
  if (++num_calls == atoi(getenv("PREAD_CALL")) && error) {
    errno = error;
    return -1;
  }
  size_t most = (size_t)atoi(getenv("PREAD_SHORT"));
  return real(fd, data, most && bytes > most ? most : bytes, offset);
}
ssize_t pread64(int fd, void* data, size_t bytes, off_t offset) {
  return pread(fd, data, bytes, offset);
}
"""

FILLING = """
import sys
import aegaeon_kernels as ak

try:
    image = ak.fill_from_safetensors(None, sys.argv[1], num_threads=int(sys.argv[2]))
    print(*image.checksums())
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.fixture(scope="module")
def failing_pread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pread")
    source, library = folder / "pread.c", folder / "pread.so"
    source.write_text(FAILING_PREAD)
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O1", "-shared", "-fPIC", source, "-o", library, "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    ("call", "code"), [(1, errno.EIO), (2, errno.EIO), (3, errno.ENOMEM), (9, errno.EIO)]
)
def test_a_failing_read_is_an_os_error(
    failing_pread: Path, file: Path, call: int, code: int, num_threads: int
) -> None:
    """Call 1 reads the header's length, call 2 the header, the others tensors."""
    output = fill_in_a_process(failing_pread, file, num_threads, call=call, code=code)
    assert output == f"{code} {file}"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_short_and_interrupted_reads_go_on(
    failing_pread: Path, file: Path, num_threads: int
) -> None:
    expected = " ".join(map(str, ak.fill_from_safetensors(None, file).checksums()))
    for call, code, short in [(9, errno.EINTR, 0), (0, 0, 100_001), (2, errno.EINTR, 77_777)]:
        found = fill_in_a_process(
            failing_pread, file, num_threads, call=call, code=code, short=short
        )
        assert found == expected


def fill_in_a_process(
    library: Path, file: Path, num_threads: int, *, call: int, code: int, short: int = 0
) -> str:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PREAD_CALL": str(call),
        "PREAD_ERRNO": str(code),
        "PREAD_SHORT": str(short),
    }
    done = subprocess.run(
        [sys.executable, "-c", FILLING, str(file), str(num_threads)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("verify", [False, True])
def test_a_sealed_image_is_not_filled_again(file: Path, verify: bool) -> None:
    image = ak.fill_from_safetensors(None, file)
    before = bytes(image)
    with pytest.raises(ak.LifecycleError, match="sealed already"):
        ak.fill_from_safetensors(image, file, verify=verify)
    assert bytes(image) == before


def test_differences_are_named(file: Path, weights: dict[str, torch.Tensor]) -> None:
    image = ak.fill_from_safetensors(None, file)
    for name, element in [("layers.2.w", 17), ("embed.weight", 5 * MIB - 1)]:
        weights[name].view(torch.uint8).view(-1)[2 * element] ^= 1
    save_file(weights, file)
    message = rf"'embed.weight' from its byte {10 * MIB - 2} on, 'layers.2.w' from its byte 34 on$"
    for num_threads in (1, 3):
        with pytest.raises(ak.IntegrityError, match=message):
            ak.compare_with_safetensors(image, file, num_threads=num_threads)
    seen: list[tuple[int, int]] = []
    with pytest.raises(ak.IntegrityError, match=message):
        ak.compare_with_safetensors(image, file, on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (image.size_bytes, image.size_bytes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": 100}, "does not have the .* bytes of the layout"),
        ({"image": 0, "name": "n"}, "for an image that is made here"),
        ({"layout": "other"}, "has tensor 'other', which is not in the files"),
        ({"layout": "norm.weight"}, r"has U8 \[1\] for tensor 'norm.weight', which is F32 \[77\]"),
        ({"layout": "norm.weight", "tied": {}}, "are for making a layout, and one is given"),
        ({"num_threads": 0}, "num_threads=0"),
    ],
)
def test_what_does_not_fit_is_the_callers_mistake(
    file: Path, arguments: dict[str, Any], message: str
) -> None:
    checkpoint = ak.Checkpoint.open(file)
    image = None
    if "image" in arguments:
        layout = ak.ImageLayout.build(checkpoint.tensors.values())
        image = ak.HostImage.allocate(arguments.pop("image") or layout.size_bytes)
    if "layout" in arguments:
        placed = PlacedTensor(arguments["layout"], "U8", (1,), 0)
        arguments["layout"] = ak.ImageLayout.build([placed])
    with pytest.raises(ValueError, match=message):
        ak.fill_from_safetensors(image, checkpoint, **arguments)
    assert image is None or not image.sealed


def test_a_checkpoint_without_bytes_fills_no_image(tmp_path: Path) -> None:
    for tensors in ({}, {"a": torch.empty(0)}):
        save_file(tensors, tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match="has no bytes to fill an image with"):
            ak.fill_from_safetensors(None, tmp_path)


def test_pieces_out_of_place_are_refused(file: Path) -> None:
    opened = ak.Checkpoint.open(file).files[0]._file
    size = file.stat().st_size
    for pieces, message in [
        ([(1, 0, 0, 1)], "file 1 of 1"),
        ([(0, size, 0, 1)], f"1 bytes at {size} of "),
        ([(0, size + 5, 0, 1)], f"1 bytes at {size + 5} of "),
        ([(0, 1, 0, 1 << 63)], "bytes at 1 of"),
        ([(0, 0, 5, 5), (0, 0, 9, 1)], "at 9 of the image begins before .* ends, at 10"),
        ([(0, 0, (1 << 64) - 1, 2)], "of the image"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.FileReader(files=[opened], pieces=pieces)
    reader = _C.FileReader(files=[opened], pieces=[(0, 0, 99, 2)])
    image = ak.HostImage.allocate(100)
    with pytest.raises(ValueError, match="ends at 101, behind the image of 100 bytes"):
        reader.fill(image, layout=b"", comparisons=[], num_threads=1, on_progress=None)
    with pytest.raises(ValueError, match="ends at 101"):
        reader.differences(image, num_threads=1, on_progress=None)
