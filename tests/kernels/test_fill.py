"""Images filled from safetensors files: every byte of every tensor, or an error and no image."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_support import MIB, pattern
from safetensors.torch import load_file, save_file

import aegaeon_kernels as ak
from aegaeon.tiny_model import write_tiny_model
from aegaeon_kernels import _C
from aegaeon_kernels.image_layout import PlacedTensor
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

CHUNK = _C.IMAGE_CHUNK_BYTES

TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.int64, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz),
    *(torch.float8_e5m2fnuz, torch.complex64, torch.float4_e2m1fn_x2),
]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    data = torch.from_numpy(pattern(size, seed))
    if dtype is torch.bool:
        data %= 2
    return data.view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def assert_holds(image: ak.HostImage, tensors: dict[str, torch.Tensor]) -> None:
    """The image has each tensor bitwise, zeros between them, and says so in its layout."""
    layout = ak.ImageLayout.from_json(image.layout_json)
    covered = np.zeros(image.size_bytes, bool)
    for name, expected in tensors.items():
        found = layout.tensor(image, name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert_bitwise_equal(bytes_of(found), bytes_of(expected))
        placed = layout.tensors[name]
        covered[placed.offset_bytes : placed.end_bytes] = True
    assert not np.frombuffer(image, np.uint8)[~covered].any()
    assert image.sealed
    image.verify()


def load_files(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, num_shards: int) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        names = list(tensors)[shard::num_shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("qwen3-moe", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Three chunks and a bit, of which one tensor is larger than a chunk."""
    tensors = {f"layers.{i}.w": random_tensor((1000 + i, 999), torch.bfloat16, i) for i in range(7)}
    tensors["embed.weight"] = random_tensor((5, MIB), torch.float16, 8)
    tensors["norm.weight"] = random_tensor((77,), torch.float32, 9)
    return tensors


@pytest.fixture
def file(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    return path


# ---- what arrives ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["qwen3-moe", "llama", "gemma3"])
def test_a_real_model_arrives_whole(tmp_path: Path, arch: str) -> None:
    folder = write_tiny_model(arch, tmp_path / "m")
    image = ak.fill_from_safetensors(None, folder, verify=True)
    assert image.name == "m"
    assert_holds(image, load_files(folder))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_sharded_model_arrives_whole(tiny_model: Path, tmp_path: Path, num_threads: int) -> None:
    tensors = load_files(tiny_model)
    folder = save_sharded(tensors, tmp_path / "sharded", 4)
    image = ak.fill_from_safetensors(None, folder, num_threads=num_threads)
    assert_holds(image, tensors)
    files = sorted(folder.glob("*.safetensors"))
    for source in (folder / "model.safetensors.index.json", files, ak.Checkpoint(files)):
        again = ak.fill_from_safetensors(None, source)
        assert again.checksums() == image.checksums()
        assert again.layout_json == image.layout_json
    single = ak.fill_from_safetensors(None, tiny_model)
    assert single.checksums() == image.checksums(), "however the files are cut"


def test_every_dtype_arrives(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}.{i}": random_tensor(shape, dtype, i)
        for dtype in TORCH_DTYPES
        for i, shape in enumerate([(3, 7), (1,), (0, 4), (2, 0), (257,)])
    }
    tensors["scalar"] = torch.tensor(1.5, dtype=torch.float64)
    save_file(tensors, tmp_path / "all.safetensors")
    stored = ak.Checkpoint.open(tmp_path / "all.safetensors").tensors.values()
    dtypes = {tensor.dtype for tensor in stored}
    assert dtypes == set(_C.SAFETENSORS_DTYPE_BITS) - {"F6_E2M3", "F6_E3M2"}
    assert_holds(ak.fill_from_safetensors(None, tmp_path), load_file(tmp_path / "all.safetensors"))


def test_six_bit_types_arrive_as_bytes(tmp_path: Path) -> None:
    header = '{"a":{"dtype":"F6_E2M3","shape":[8],"data_offsets":[0,6]}}'
    data = len(header).to_bytes(8, "little") + header.encode() + b"sixsix"
    (tmp_path / "m.safetensors").write_bytes(data)
    image = ak.fill_from_safetensors(None, tmp_path)
    assert bytes(image) == b"sixsix"
    with pytest.raises(ValueError, match="torch has no dtype for F6_E2M3, that of 'a'"):
        ak.ImageLayout.from_json(image.layout_json).tensor(image, "a")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_pieces_of_all_sizes_and_orders_arrive(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The order of the image is not that of the file; sizes border on parts and chunks."""
    sizes = st.one_of(
        st.integers(0, 3000),
        st.sampled_from([256, 65536, MIB - 1, MIB, MIB + 1, CHUNK - 1, CHUNK, CHUNK + 1]),
    )
    drawn = data.draw(st.lists(sizes, min_size=1, max_size=8))
    tensors = {f"t{i}": random_tensor((size,), torch.uint8, i) for i, size in enumerate(drawn)}
    tensors["last"] = random_tensor((5,), torch.uint8, 99)
    names = data.draw(st.permutations(list(tensors)))
    cut = data.draw(st.integers(0, len(names)))
    layers = {"first": names[:cut], "second": names[cut:]}
    folder = tmp_path_factory.mktemp("m")
    save_file(tensors, folder / "m.safetensors")
    num_threads = data.draw(st.integers(1, 4))
    image = ak.fill_from_safetensors(None, folder, layers=layers, num_threads=num_threads)
    assert list(ak.ImageLayout.from_json(image.layout_json).tensors) == names
    assert_holds(image, tensors)


def test_neighbours_are_read_together(tmp_path: Path) -> None:
    tensors = {f"layers.0.{i:02}": random_tensor((64, 4), torch.float32, i) for i in range(50)}
    tensors["layers.0.99"] = random_tensor((3,), torch.uint8, 99)
    tensors["layers.1.a"] = random_tensor((7,), torch.uint8, 100)
    save_file(tensors, tmp_path / "m.safetensors")
    checkpoint = ak.Checkpoint.open(tmp_path)
    layout = ak.ImageLayout.build(checkpoint.tensors.values())
    pieces = [
        (0, checkpoint.tensors[name].offset_bytes, placed.offset_bytes, placed.size_bytes)
        for name, placed in layout.tensors.items()
    ]
    reader = _C.FileReader(files=[checkpoint.files[0]._file], pieces=pieces)
    assert (reader.num_pieces, reader.size_bytes) == (2, 50 * 1024 + 3 + 7)


def test_an_image_of_the_callers_is_filled_over_what_it_held(file: Path, weights: Any) -> None:
    checkpoint = ak.Checkpoint.open(file)
    layout = ak.ImageLayout.build(checkpoint.tensors.values())
    image = ak.HostImage.allocate(layout.size_bytes)
    image.metadata = {"model": "m"}
    np.frombuffer(image, np.uint8)[:] = 255
    assert ak.fill_from_safetensors(image, checkpoint, layout=layout) is image
    assert_holds(image, weights)
    assert image.metadata == {"model": "m"}


def test_an_image_for_a_device_and_from_a_pool(device: FaultyDevice, file: Path) -> None:
    image = ak.fill_from_safetensors(None, file, device=device, name="n")
    assert (image.pinned, image.name) == (device.kind == "cuda", "n")
    with ak.HostPool(device, capacity_bytes=64 * MIB) as pool:
        from_pool = ak.fill_from_safetensors(None, file, pool=pool)
        assert from_pool.checksums() == image.checksums()
        del from_pool
    del image
    assert device.live == {}


def test_a_saved_image_opens_with_its_layout(file: Path, weights: Any, tmp_path: Path) -> None:
    ak.fill_from_safetensors(None, file).save(tmp_path / "m.image")
    image = ak.HostImage.open(tmp_path / "m.image")
    assert_holds(image, weights)
    ak.compare_with_safetensors(image, file)


def test_a_layout_may_leave_tensors_out(file: Path, weights: Any) -> None:
    checkpoint = ak.Checkpoint.open(file)
    some = [checkpoint.tensors[name] for name in ("layers.3.w", "norm.weight")]
    layout = ak.ImageLayout.build(some)
    image = ak.fill_from_safetensors(None, checkpoint, layout=layout)
    assert_holds(image, {tensor.name: weights[tensor.name] for tensor in some})


def test_tied_tensors_are_read_once_and_compared(tmp_path: Path) -> None:
    tensors = {
        "embed.weight": random_tensor((3000, 1500), torch.float16, 1),
        "norm.weight": random_tensor((10,), torch.float16, 2),
    }
    tied = {"lm_head.weight": "embed.weight", "other.weight": "embed.weight"}
    for stored in ({}, {"lm_head.weight"}, set(tied)):
        both = {**tensors, **{name: tensors["embed.weight"].clone() for name in stored}}
        save_file(both, tmp_path / "m.safetensors")
        image = ak.fill_from_safetensors(None, tmp_path, tied=tied)
        assert image.size_bytes == 9_000_000 - 9_000_000 % -65536 + 20
        assert_holds(image, {**tensors, **dict.fromkeys(tied, tensors["embed.weight"])})
    both["other.weight"][2999, 1499] += 1
    save_file(both, tmp_path / "m.safetensors")
    with pytest.raises(ak.IntegrityError, match=r"'embed.weight' from its byte 8999998 on"):
        ak.fill_from_safetensors(None, tmp_path, tied=tied)
    # Which of them is stored does not matter.
    del both["embed.weight"], both["other.weight"]
    save_file(both, tmp_path / "m.safetensors")
    layout = ak.ImageLayout.from_json(image.layout_json)
    assert_holds(
        ak.fill_from_safetensors(None, tmp_path, layout=layout),
        {**tensors, **dict.fromkeys(tied, tensors["embed.weight"])},
    )


# ---- progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("verify", [False, True])
def test_progress_rises_to_the_end(file: Path, num_threads: int, verify: bool) -> None:
    seen: list[tuple[int, int]] = []
    threads = set()

    def on_progress(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(threading.get_ident())

    image = ak.fill_from_safetensors(
        None, file, num_threads=num_threads, on_progress=on_progress, verify=verify
    )
    total = image.size_bytes * (1 + verify)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {total for _, total in seen} == {total}
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("num_threads", [1, 3])
def test_an_exception_in_the_callback_ends_the_filling(file: Path, num_threads: int) -> None:
    layout = ak.ImageLayout.build(ak.Checkpoint.open(file).tensors.values())
    image = ak.HostImage.allocate(layout.size_bytes)

    class Enough(Exception):
        pass

    def on_progress(done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        ak.fill_from_safetensors(image, file, num_threads=num_threads, on_progress=on_progress)
    assert not image.sealed
    assert image.layout_json == b""
    ak.fill_from_safetensors(image, file)  # nothing of the first attempt is in the way
    image.verify()


def test_other_python_threads_run_meanwhile(file: Path) -> None:
    """They could not if the reading held the GIL: the callback waits for one of them."""
    ran = threading.Event()
    threading.Thread(target=ran.set).start()
    ak.fill_from_safetensors(None, file, on_progress=lambda *_: ran.wait(60), num_threads=2)
    assert ran.is_set()


# ---- what goes wrong ---------------------------------------------------------------------------


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
