"""Images filled from safetensors files: every byte of every tensor, or an error and no image."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fill_support import (
    CHUNK,
    TORCH_DTYPES,
    assert_holds,
    load_files,
    random_tensor,
    save_sharded,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_support import MIB
from safetensors.torch import load_file, save_file

import aegaeon_kernels as ak
from aegaeon.tiny_model import write_tiny_model
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("qwen3-moe", tmp_path_factory.mktemp("model") / "tiny")


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
