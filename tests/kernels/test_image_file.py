"""Images on disk: what is opened is what was saved, with all that goes with it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_file_support import (
    CHUNK,
    PAGE,
    TAIL,
    listed,
    nothing_left,
    saved,
    sealed_image,
)
from kernel_support import MIB, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal


@pytest.mark.parametrize(
    "size", [1, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 12345]
)
def test_an_opened_image_is_what_was_saved(tmp_path: Path, size: int) -> None:
    image = sealed_image(size)
    path = tmp_path / "qwen.image"
    image.save(path)
    assert listed(tmp_path) == {"qwen.image"}
    assert path.stat().st_mode & 0o777 == 0o600
    opened = ak.HostImage.open(path)
    assert_bitwise_equal(memoryview(opened), memoryview(image))
    assert (opened.name, opened.sealed, opened.size_bytes) == ("qwen.image", True, size)
    assert opened.checksums() == image.checksums()
    assert opened.metadata == {"model": "qwen", "rank": 3}
    assert opened.layout_json == b'{"tensors": []}'
    opened.verify()
    again = tmp_path / "again"
    opened.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_bytes_stand_at_the_front_and_the_rest_as_documented(tmp_path: Path) -> None:
    """The offsets of image_footer.hpp, read by another reader."""
    size = CHUNK + 5000
    data = saved(tmp_path, size).read_bytes()
    image = sealed_image(size)
    assert data[:size] == bytes(image)
    payload, chunk, metadata_bytes, layout_bytes = struct.unpack("<QQII", data[-TAIL : -TAIL + 24])
    assert (payload, chunk) == (size, CHUNK)
    assert data[-40:-16] == bytes(24)
    version, checksum, magic = struct.unpack("<II8s", data[-16:])
    assert (version, magic) == (1, b"AEGIMAGE")
    assert checksum == _C.crc32c_portable(data[size:-12], before=0)
    footer = data[-(-size // PAGE) * PAGE : -TAIL]
    assert list(struct.unpack("<2I", footer[:8])) == image.checksums()
    metadata, layout = footer[8 : 8 + metadata_bytes], footer[8 + metadata_bytes :]
    assert metadata == b'{"model":"qwen","rank":3}'
    assert layout == b'{"tensors": []}'
    assert len(layout) == layout_bytes


def test_an_image_is_opened_into_the_memory_asked_for(device: FaultyDevice, tmp_path: Path) -> None:
    path = saved(tmp_path, 3 * MIB)
    pool = ak.HostPool(device, 8 * MIB)
    device.reset()
    image = ak.HostImage.open(path, pool=pool, name="mine")
    assert device.calls == {}
    assert pool.stats().holders == {"mine": 3 * MIB}
    alone = ak.HostImage.open(path, device=device)
    assert alone.pinned == (device.kind == "cuda")
    assert device.calls == {"host_alloc": 1}
    assert_bitwise_equal(memoryview(image), memoryview(alone))


def test_saving_takes_the_place_of_an_older_file_at_once(tmp_path: Path) -> None:
    path = saved(tmp_path, CHUNK + 1, seed=1)
    before = path.open("rb")
    sealed_image(CHUNK + 1, seed=2).save(path)
    with before:
        old = before.read(CHUNK + 1)
    assert_bitwise_equal(old, pattern(CHUNK + 1, 1))  # who had it open still sees the old one
    assert_bitwise_equal(memoryview(ak.HostImage.open(path)), pattern(CHUNK + 1, 2))
    assert listed(tmp_path) == {path.name}


def test_progress_counts_bytes_and_ends_with_all(tmp_path: Path) -> None:
    size = 5 * CHUNK + 1
    image = sealed_image(size)
    for num_threads in (1, 2, 3, 16):
        for seen in _saved_and_opened(image, tmp_path / "x", num_threads):
            done = [progress[0] for progress in seen]
            assert done == sorted(done)
            assert done[-1] == size
            assert {progress[1] for progress in seen} == {size}


def _saved_and_opened(
    image: ak.HostImage, path: Path, num_threads: int
) -> Iterator[list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    image.save(path, num_threads=num_threads, on_progress=lambda *done: seen.append(done))
    yield seen
    seen = []
    ak.HostImage.open(path, num_threads=num_threads, on_progress=lambda *done: seen.append(done))
    yield seen


class Enough(Exception):
    pass


@pytest.mark.parametrize("num_threads", [1, 4])
def test_an_exception_from_progress_ends_the_work_and_leaves_nothing(
    host: FaultyDevice, tmp_path: Path, num_threads: int
) -> None:
    def enough(done: int, total: int) -> None:
        raise Enough

    image = sealed_image(4 * CHUNK)
    with nothing_left(), pytest.raises(Enough):
        image.save(tmp_path / "x", num_threads=num_threads, on_progress=enough)
    assert listed(tmp_path) == set()
    image.save(tmp_path / "x")
    with nothing_left(), pytest.raises(Enough):
        ak.HostImage.open(tmp_path / "x", device=host, num_threads=num_threads, on_progress=enough)
    assert host.live == {}


# ---- metadata and layout -----------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=20)
VALUES = st.one_of(st.text(max_size=50), st.integers(-(1 << 63), (1 << 63) - 1))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=10))
def test_metadata_comes_back(metadata: dict[str, str | int]) -> None:
    image, copy = ak.HostImage.allocate(1), ak.HostImage.allocate(1)
    try:
        image.metadata = metadata
    except UnicodeEncodeError:  # a lone surrogate is no text
        assert any("\ud800" <= c <= "\udfff" for c in str(metadata) + "".join(metadata))
        return
    assert image.metadata == metadata
    copy.metadata = image.metadata
    assert copy.metadata == metadata
    assert [type(value) for value in image.metadata.values()] == [
        type(metadata[key]) for key in image.metadata
    ]


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": 1.5},
        {"a": True},
        {"a": None},
        {"a": [1]},
        {"a": {"b": 1}},
        {1: "a"},
        {"": "a"},
        {"a": 1 << 63},
        {"a": "x" * (64 << 10)},
    ],
)
def test_metadata_of_other_kinds_is_the_callers_mistake(metadata: dict[str, str | int]) -> None:
    image = ak.HostImage.allocate(1)
    with pytest.raises(ValueError, match="metadata"):
        image.metadata = metadata
    assert image.metadata == {}


@pytest.mark.parametrize("layout", [b"{", b"NaN", b"\xff", b"[" * 100_000, b"1 2", b"[1,]"])
def test_a_layout_is_json(layout: bytes) -> None:
    image = ak.HostImage.allocate(1)
    with pytest.raises(ValueError, match=r".+"):
        image.layout_json = layout
    assert image.layout_json == b""


def test_a_layout_has_a_limit() -> None:
    image = ak.HostImage.allocate(1)
    with pytest.raises(ValueError, match="limit"):
        image.layout_json = b'"' + b"x" * _C.MAX_LAYOUT_BYTES + b'"'


def test_what_goes_with_an_image_is_fixed_by_its_seal() -> None:
    image = sealed_image(10)
    with pytest.raises(ak.LifecycleError, match="sealed already"):
        image.metadata = {}
    with pytest.raises(ak.LifecycleError, match="sealed already"):
        image.layout_json = b"1"
    assert image.metadata == {"model": "qwen", "rank": 3}
