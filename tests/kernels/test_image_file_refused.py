"""Image files that are not what was saved: each is refused, with what is wrong."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_file_support import (
    CHUNK,
    PAGE,
    TAIL,
    refused,
    saved,
)
from kernel_support import pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C


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
