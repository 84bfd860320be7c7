"""Images on disk: what save() leaves whatever happens, and all that open() refuses."""

from __future__ import annotations

import os
import signal
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import MIB, pattern, run_program

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

CHUNK = _C.IMAGE_CHUNK_BYTES
PAGE = 4096
TAIL = 64


def make_image(size: int, seed: int = 1, **options: object) -> ak.HostImage:
    image = ak.HostImage.allocate(size, **options)  # type: ignore[arg-type]
    np.frombuffer(image, np.uint8)[:] = pattern(size, seed)
    return image


def sealed_image(size: int, seed: int = 1) -> ak.HostImage:
    image = make_image(size, seed)
    image.metadata = {"model": "qwen", "rank": 3}
    image.layout_json = b'{"tensors": []}'
    image.seal()
    return image


def saved(folder: Path, size: int, seed: int = 1) -> Path:
    path = folder / f"{size}.image"
    sealed_image(size, seed).save(path)
    return path


def listed(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@contextmanager
def nothing_left() -> Iterator[None]:
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


# ---- there and back ----------------------------------------------------------------------------


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


# ---- what is refused ---------------------------------------------------------------------------


def refused(path: Path, data: bytes, message: str | None = None) -> None:
    path.write_bytes(data)
    device = FaultyDevice(ak.Device("host", memory_bytes=MIB))
    with nothing_left(), pytest.raises(ak.IntegrityError, match=message) as caught:
        ak.HostImage.open(path, device=device)
    assert str(path) in str(caught.value)
    caught = None  # type: ignore[assignment]  # its frames hold the image
    assert device.live == {}


def test_any_byte_that_is_flipped_is_found(tmp_path: Path) -> None:
    """Every single one of a file that has all the parts; every bit of its tail."""
    size = 100
    data = saved(tmp_path, size).read_bytes()
    assert len(data) > PAGE
    positions = [*range(size), *range(size, PAGE, 97), *range(PAGE, len(data))]
    for at in positions:
        for bit in range(8) if at >= len(data) - TAIL else [at % 8]:
            altered = bytearray(data)
            altered[at] ^= 1 << bit
            refused(tmp_path / "x", bytes(altered))


def test_a_flipped_byte_is_found_with_its_chunk(tmp_path: Path) -> None:
    data = bytearray(saved(tmp_path, 2 * CHUNK + 10).read_bytes())
    data[CHUNK + 7] ^= 1
    data[2 * CHUNK + 9] ^= 128
    path = tmp_path / "x"
    path.write_bytes(data)
    message = rf"x: 2 of 3 chunks .*chunk 1 \[{CHUNK}, {2 * CHUNK}\), chunk 2 "
    refused(path, bytes(data), message)
    image = ak.HostImage.open(path, verify=False)
    with pytest.raises(ak.IntegrityError, match=r"'x': 2 of 3 chunks"):
        image.verify()


@pytest.mark.parametrize("size", [1, PAGE, CHUNK + 1])
def test_a_torn_file_is_refused_wherever_it_ends(tmp_path: Path, size: int) -> None:
    data = saved(tmp_path, size).read_bytes()
    lengths = {0, 1, TAIL - 1, TAIL, size, size - 1, size + 1, len(data) - TAIL, PAGE}
    lengths |= set(range(len(data) - 2 * TAIL, len(data)))
    for length in lengths:
        if length < len(data):
            refused(tmp_path / "x", data[:length], "not an image")


def test_a_file_with_something_added_is_refused(tmp_path: Path) -> None:
    data = saved(tmp_path, 1000).read_bytes()
    refused(tmp_path / "x", data + b"\0", "not an image")
    refused(tmp_path / "x", data + data, "something is added")
    refused(tmp_path / "x", b"\0" + data, "something is added")
    refused(tmp_path / "x", data[1:], "torn")


def test_a_file_with_a_hole_is_refused(tmp_path: Path) -> None:
    """What a machine that lost power may leave: the length without the bytes."""
    path = saved(tmp_path, 3 * CHUNK)
    data = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        file.write(data[:CHUNK])
        file.seek(2 * CHUNK)
        file.write(data[2 * CHUNK :])
    with pytest.raises(ak.IntegrityError, match="chunk 1 "):
        ak.HostImage.open(path)
    os.truncate(path, 0)
    os.truncate(path, len(data))
    with pytest.raises(ak.IntegrityError, match="not an image"):
        ak.HostImage.open(path)


def with_tail(data: bytes, **fields: int) -> bytes:
    """The file with other numbers in its tail, and a checksum that agrees."""
    at = {"payload_bytes": 0, "chunk_bytes": 8, "metadata_bytes": 16, "layout_bytes": 20}
    at |= {"zeros": 24, "version": 48}
    tail = bytearray(data[-TAIL:])
    for name, value in fields.items():
        struct.pack_into("<Q" if at[name] in (0, 8, 24) else "<I", tail, at[name], value)
    covered = data[100:-TAIL] + tail[:-12]
    struct.pack_into("<I", tail, 52, _C.crc32c(bytes(covered), before=0))
    return data[:-TAIL] + tail


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2; this is a reader of version 1"),
        ({"version": 0}, "version 0"),
        ({"chunk_bytes": 4 << 20}, "chunks of 4194304 bytes"),
        ({"payload_bytes": 0}, "an image of 0 bytes"),
        ({"payload_bytes": (1 << 64) - 1}, "an image of 18446744073709551615 bytes"),
        ({"payload_bytes": (1 << 46) + 1}, "an image of"),
        ({"payload_bytes": 1 << 46}, "torn"),
        ({"payload_bytes": 99}, "differs from its checksum"),
        ({"metadata_bytes": (64 << 10) + 1}, "metadata of 65537 bytes, over the limit"),
        ({"metadata_bytes": (1 << 32) - 1}, "over the limit"),
        ({"metadata_bytes": 1000}, "torn"),
        ({"metadata_bytes": 1, "layout_bytes": 0}, "something is added"),
        ({"layout_bytes": (64 << 20) + 1}, "a layout of 67108865 bytes, over the limit"),
        ({"zeros": 1}, "reserved"),
    ],
)
def test_every_number_of_the_tail_is_checked(
    tmp_path: Path, fields: dict[str, int], message: str
) -> None:
    data = saved(tmp_path, 100).read_bytes()
    assert with_tail(data) == data
    refused(tmp_path / "x", with_tail(data, **fields), message)


@pytest.mark.parametrize(
    ("metadata", "layout"),
    [
        (b"[]", b""),
        (b"{}", b""),
        (b'{"a": 1}', b""),
        (b'{"a":1,"a":1}', b""),
        (b'{"b":1,"a":1}', b""),
        (b'{"a":NaN}', b""),
        (b'{"a":1e3}', b""),
        (b'{"a":[1]}', b""),
        (b"\xff", b""),
        (b"[" * 60_000, b""),
        (b'{"a":' + b"9" * 5000 + b"}", b""),
        (b"", b"{"),
        (b"", b"\xff"),
        (b"", b"[" * 100_000),
    ],
)
def test_metadata_or_a_layout_that_we_would_not_write_is_refused(
    tmp_path: Path, metadata: bytes, layout: bytes
) -> None:
    data = pattern(100, seed=1).tobytes()
    footer = _C.serialize_footer(
        payload_bytes=100,
        checksums=[_C.crc32c(data, before=0)],
        metadata=metadata,
        layout=layout,
    )
    _C.parse_image(data + footer)
    refused(tmp_path / "x", data + footer)


def test_what_stands_in_the_padding_is_checked(tmp_path: Path) -> None:
    data = bytearray(saved(tmp_path, 100).read_bytes())
    data[200] = 1
    tail_at = len(data) - TAIL
    struct.pack_into("<I", data, tail_at + 52, _C.crc32c(bytes(data[100:-12]), before=0))
    refused(tmp_path / "x", bytes(data), "between the image and its footer are not zero")


SMALL = 300


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_file_is_refused_or_identical(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("altered")
    original = saved(folder, SMALL).read_bytes()
    altered = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        how = data.draw(st.sampled_from(["flip", "cut", "extend", "move", "number"]))
        at = data.draw(st.integers(0, max(len(altered) - 1, 0)))
        if how == "flip" and altered:
            altered[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del altered[at : at + data.draw(st.integers(1, 5000))]
        elif how == "extend":
            altered[at:at] = data.draw(st.binary(min_size=1, max_size=100))
        elif how == "move":
            altered = altered[at:] + altered[:at]
        elif how == "number" and len(altered) >= TAIL:
            number = data.draw(st.sampled_from([0, 1, SMALL, 1 << 31, (1 << 32) - 1]))
            struct.pack_into("<I", altered, len(altered) - TAIL + 4 * (at % 16), number)
    if altered == original:
        _C.parse_image(bytes(altered))
    else:
        with pytest.raises(ak.IntegrityError):
            _C.parse_image(bytes(altered))
        refused(folder / "x", bytes(altered))


# ---- the world around --------------------------------------------------------------------------


def test_what_is_no_file_is_an_os_error_or_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ak.HostImage.open(tmp_path / "nowhere")
    assert caught.value.filename == str(tmp_path / "nowhere")
    with pytest.raises(ak.IntegrityError, match="not a file"):
        ak.HostImage.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ak.IntegrityError, match="not a file"):  # and does not wait for a writer
        ak.HostImage.open(tmp_path / "pipe")
    image = sealed_image(10)
    with pytest.raises(FileNotFoundError):
        image.save(tmp_path / "nowhere" / "x")
    with pytest.raises(IsADirectoryError):
        image.save(tmp_path)
    with pytest.raises(ValueError, match="does not name a file"):
        image.save(f"{tmp_path}/..")
    assert listed(tmp_path) == {"pipe"}


def test_names_need_not_be_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.image"))
    sealed_image(10).save(path)
    image = ak.HostImage.open(path)
    assert image.name == "\\xff.image"
    path.write_bytes(b"nothing")
    with pytest.raises(ak.IntegrityError, match="not an image"):
        ak.HostImage.open(path)
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        ak.HostImage.open(path)
    assert caught.value.filename == str(path)


def test_only_a_sealed_image_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ak.LifecycleError, match="not sealed"):
        make_image(10).save(tmp_path / "x")
    assert listed(tmp_path) == set()


def test_no_memory_for_an_image_leaves_nothing(host: FaultyDevice, tmp_path: Path) -> None:
    path = saved(tmp_path, MIB)
    host.fail_call(1, call="host_alloc", code=2)
    with nothing_left(), pytest.raises(ak.OutOfMemory):
        ak.HostImage.open(path, device=host)
    pool = ak.HostPool(host, 64 << 10)
    with nothing_left(), pytest.raises(ak.OutOfMemory, match="asked a host pool for 1 MiB"):
        ak.HostImage.open(path, pool=pool)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's."""
    path = saved(tmp_path, 2 * MIB, seed=1)
    program = """
import resource, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(20 << 20)
image.seal()
resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))
try:
    image.save(sys.argv[1])
except OSError as error:
    print(error.errno, error.filename == sys.argv[1])
"""
    result = run_program(program, str(path))
    assert result.stdout == "27 True\n", result.stderr  # EFBIG
    assert listed(tmp_path) == {path.name}
    assert_bitwise_equal(memoryview(ak.HostImage.open(path)), pattern(2 * MIB, 1))


def test_a_killed_saver_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = saved(tmp_path, 2 * MIB, seed=1)
    program = """
import os, signal, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(80 << 20)
image.seal()
def kill(done, total):
    if done > 16 << 20:
        os.kill(os.getpid(), signal.SIGKILL)
image.save(sys.argv[1], num_threads=1, on_progress=kill)
"""
    assert run_program(program, str(path)).returncode == -signal.SIGKILL
    assert listed(tmp_path) == {path.name}
    assert_bitwise_equal(memoryview(ak.HostImage.open(path)), pattern(2 * MIB, 1))


def test_ctrl_c_ends_a_long_read(tmp_path: Path) -> None:
    program = """
import os, signal, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(200 << 20)
image.seal()
image.save(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
main = os.getpid()
def interrupt(done, total):
    os.kill(main, signal.SIGINT)
try:
    ak.HostImage.open(sys.argv[1], num_threads=1, on_progress=interrupt)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run_program(program, str(tmp_path / "x")).stdout == "interrupted\n"


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 4 * CHUNK)

    def shrink(done: int, total: int) -> None:
        os.truncate(path, 2 * CHUNK)

    with nothing_left(), pytest.raises(ak.IntegrityError, match="ends at byte"):
        ak.HostImage.open(path, num_threads=1, on_progress=shrink)


def test_a_folder_without_permission_is_an_os_error() -> None:
    program = """
import os, sys
import aegaeon_kernels as ak
image = ak.HostImage.allocate(10)
image.seal()
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    image.save(sys.argv[1] + "/x")
except PermissionError:
    print("refused")
"""
    # Not below pytest's own folders, which other users may not even enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        result = run_program(program, name)
        assert result.stdout == "refused\n", result.stderr
        assert listed(folder) == set()
