"""What comes from files that anybody may have written: refused, or sound, and nothing else.

Valid documents are spoilt by a mutator that knows the formats' words and numbers, and arbitrary
ones come from hypothesis. Headers of safetensors files have the reference implementation for an
oracle here and in test_safetensors_header.py; the native parsers also run under sanitizers
(csrc/tests, safetensors_fuzz and images_fuzz).
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import safetensors
from header_mutations import FRAGMENTS, Headers, file_of
from hypothesis import given, settings
from hypothesis import strategies as st

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.image_layout import PlacedTensor
from aegaeon_kernels.safetensors_file import parse_index

TAIL = 64
WORDS = [fragment.encode("utf-8", "surrogatepass") for fragment in FRAGMENTS]
WORDS += [b"weight_map", b"metadata", b"model.safetensors", b"../x.safetensors", b"layers", b"kind"]
WORDS += [b"tensors", b"offset_bytes", b"size_bytes", b"tied_to", b"BF16", b'"x":', b",null", b"{}"]
WORDS += [b"9223372036854775807", b"-9223372036854775809", b"[" * 300, b'{"a":' * 300]


def spoilt(random: Random, document: bytes) -> bytes:
    changed = bytearray(document)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(len(changed) + 1)
        size = random.choice([1, 1, 2, 4, 8, 30])
        match random.randrange(6):
            case 0:
                changed[at : at + 1] = random.randbytes(1)
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = random.choice(WORDS)
            case 3:
                changed[at : at + size] = random.choice(WORDS)
            case 4:
                begin = random.randrange(len(changed) + 1)
                changed[at:at] = changed[begin : begin + size]
            case _:
                digits = [i for i, byte in enumerate(changed) if 48 <= byte <= 57]
                if digits:
                    changed[random.choice(digits)] = random.choice(b"0123456789")
    return bytes(changed)


# ---- one oracle for each parser: None for what is refused ---------------------------------------


def index_verdict(encoded: bytes) -> dict[str, str] | None:
    try:
        weight_map = parse_index(encoded)
    except ValueError:
        return None
    again = json.loads(encoded)["weight_map"]
    assert weight_map == again
    for shard in weight_map.values():
        assert shard.endswith(".safetensors")
        assert "/" not in shard
    return weight_map


def layout_verdict(encoded: bytes) -> ak.ImageLayout | None:
    try:
        layout = ak.ImageLayout.from_json(encoded)
    except ValueError:
        return None
    again = ak.ImageLayout.from_json(layout.to_json())
    assert again == layout
    assert again.to_json() == layout.to_json()
    end = 0
    for name, tensor in layout.tensors.items():
        assert 0 <= tensor.offset_bytes <= layout.size_bytes - tensor.size_bytes, name
        end = max(end, tensor.offset_bytes + tensor.size_bytes)
    assert end <= layout.size_bytes
    return layout


def image_verdict(encoded: bytes) -> object | None:
    try:
        payload_bytes, checksums, metadata, layout = _C.parse_image(encoded)
    except ak.IntegrityError:
        return None
    footer = _C.serialize_footer(
        payload_bytes=payload_bytes, checksums=checksums, metadata=metadata, layout=layout
    )
    assert encoded[payload_bytes:] == footer, "a file has one form only"
    return payload_bytes


def header_verdict(encoded: bytes) -> object | None:
    try:
        header_bytes, tensors, _ = _C.parse_safetensors(encoded)
    except ak.IntegrityError:
        ours = None
    else:
        data = 8 + header_bytes
        ours = sorted((n, d, tuple(s), encoded[data + b : data + e]) for n, d, s, b, e in tensors)
    try:
        theirs = sorted(
            (name, tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in safetensors.deserialize(encoded)
        )
    except safetensors.SafetensorError:
        theirs = None
    assert ours == theirs
    return ours


# ---- valid documents to begin with ---------------------------------------------------------------


def some_index(random: Random) -> bytes:
    shards = [f"model-{i:05}-of-00003.safetensors" for i in range(3)]
    weights = {f"model.layers.{i}.w": random.choice(shards) for i in range(random.randrange(1, 6))}
    return json.dumps({"metadata": {"total_size": 7}, "weight_map": weights}).encode()


def some_layout(random: Random) -> bytes:
    tensors = [
        PlacedTensor(
            f"model.layers.{i}.{part}",
            random.choice(["F32", "BF16", "U8"]),
            (random.randrange(1, 40), random.randrange(1, 9)),
            offset_bytes=0,
        )
        for i in range(random.randrange(1, 3))
        for part in ("q", "k")
    ]
    return ak.ImageLayout.build(tensors).to_json()


def some_image(random: Random) -> bytes:
    payload = random.randbytes(random.randrange(1, 300))
    return payload + _C.serialize_footer(
        payload_bytes=len(payload),
        checksums=[_C.crc32c(payload, before=0)],
        metadata=b'{"a":1}' if random.random() < 0.5 else b"",
        layout=some_layout(random) if random.random() < 0.5 else b"",
    )


def mend(random: Random, image: bytes) -> bytes:
    """The checksum of the footer made right again, so that what is behind it is reached."""
    if random.random() < 0.5 or len(image) < TAIL:
        return image
    (payload_bytes,) = struct.unpack_from("<Q", image, len(image) - TAIL)
    if payload_bytes > len(image) - 12:
        return image
    checksum = _C.crc32c(image[payload_bytes:-12], before=0)
    return image[:-12] + struct.pack("<I", checksum) + image[-8:]


def spoilt_image(random: Random, image: bytes) -> bytes:
    if random.random() < 0.5:
        at = len(image) - TAIL + random.randrange(TAIL - 8)
        number = random.choice([0, 1, 64, 4096, 1 << 23, 1 << 46, (1 << 64) - 1])
        image = image[:at] + struct.pack("<Q", number) + image[at + 8 :]
    else:
        image = spoilt(random, image)
    return mend(random, image)


HEADERS = Headers(99)

PARSERS: dict[str, tuple[Callable[[bytes], object | None], Callable[[Random], bytes]]] = {
    "index": (index_verdict, lambda random: spoilt(random, some_index(random))),
    "layout": (layout_verdict, lambda random: spoilt(random, some_layout(random))),
    "image": (image_verdict, lambda random: spoilt_image(random, some_image(random))),
    "header": (header_verdict, lambda random: spoilt(random, HEADERS.next_file())),
}


def execute(parser: str, num: int) -> None:
    verdict, next_document = PARSERS[parser]
    random = Random(num)
    seen: Counter[bool] = Counter()
    for _ in range(num):
        document = next_document(random)
        try:
            seen[verdict(document) is not None] += 1
        except BaseException:
            print(document)
            raise
    assert min(seen[True], seen[False]) > num / 100, f"both verdicts are common: {seen}"


@pytest.mark.parametrize("parser", PARSERS)
def test_spoilt_documents_are_refused_or_sound(parser: str) -> None:
    execute(parser, 10_000)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("parser", PARSERS)
def test_a_million_spoilt_documents_are_refused_or_sound(parser: str) -> None:
    execute(parser, 1_000_000)


# ---- arbitrary ones ------------------------------------------------------------------------------

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["weight_map", "layers", "kind", "version", "size_bytes", "tensors"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
ENCODED = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200)


@settings(max_examples=200, deadline=None)
@given(encoded=ENCODED)
def test_arbitrary_json_is_refused_or_sound(encoded: bytes) -> None:
    index_verdict(encoded)
    layout_verdict(encoded)
    header_verdict(file_of(encoded))


@settings(max_examples=200, deadline=None)
@given(encoded=st.binary(max_size=200), tail=st.binary(min_size=TAIL, max_size=TAIL))
def test_arbitrary_bytes_are_refused_or_sound(encoded: bytes, tail: bytes) -> None:
    header_verdict(encoded)
    image_verdict(encoded)
    image_verdict(encoded + tail[:-8] + b"AEGIMAGE")
