"""Headers of safetensors files: the reference implementation's verdict, with better reasons."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import safetensors
from header_mutations import Headers, file_of

import aegaeon_kernels as ak
from aegaeon_kernels import _C

# What fits a minute on a busy machine of two cores. AEGAEON_HEADERS=1000000 is the full count.
NUM_HEADERS = int(os.environ.get("AEGAEON_HEADERS", "250000"))

Verdict = list[tuple[str, str, tuple[int, ...], bytes]] | None


def reference(file: bytes) -> Verdict:
    try:
        tensors = safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return None
    return sorted((n, t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in tensors)


def ours(file: bytes) -> Verdict:
    try:
        header_bytes, tensors, _ = _C.parse_safetensors(file)
    except ak.IntegrityError:
        return None
    data = 8 + header_bytes
    return sorted((n, d, s, file[data + begin : data + end]) for n, d, s, begin, end in tensors)


def written(header: str, data_bytes: int) -> bytes:
    return file_of(header.encode("utf-8", "surrogatepass"), data_bytes)


@pytest.mark.parametrize("seed", range(5))
def test_every_verdict_is_the_references(seed: int) -> None:
    headers = Headers(seed)
    verdicts: Counter[bool] = Counter()
    for _ in range(NUM_HEADERS // 5):
        file = headers.next_file()
        expected = reference(file)
        assert ours(file) == expected, file
        verdicts[expected is not None] += 1
    assert min(verdicts[True], verdicts[False]) > 0.2 * verdicts.total()


def tensor(**changed: str) -> str:
    fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]", **changed}
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def one(**changed: str) -> str:
    return f'{{"a":{tensor(**changed)}}}'


def two(**changed: str) -> str:
    return f'{{"a":{tensor()},"b":{tensor(**changed)}}}'


BAD = {
    "an empty file": (b"", "not a safetensors file: 0 bytes"),
    "a length cut short": (b"\2\0\0\0\0\0\0", "not a safetensors file: 7 bytes"),
    "a header that is not there": (file_of(b"{}")[:9], "header of 2 bytes in a file of 9"),
    "a length above the limit": (
        (100_000_001).to_bytes(8, "little"),
        "header of 100000001 bytes, over the limit of 100000000",
    ),
    "a length of the largest number": (b"\xff" * 8, "over the limit"),
    "no header at all": (written("", 0), "has to start with '{', at byte 0 of 0"),
    "a list": (written("[]", 0), "not a JSON object: it has to start with '{'"),
    "a byte order mark": (written("\ufeff{}", 0), "has to start with '{'"),
    "bytes that are not UTF-8": (file_of(b'{"\xff":1}'), "not UTF-8, at byte 2 of 7"),
    "more behind the object": (written("{}\0", 0), "more behind its JSON object, at byte 2 of 3"),
    "a trailing comma": (
        written(f'{{"a":{tensor()},}}', 4),
        "expected a name in quotes",
    ),
    "a text without an end": (written('{"a', 0), "it ends within a text"),
    "a control character": (written('{"a\n":1}', 0), "a control character within a text"),
    "half a surrogate pair": (written('{"\\ud800":1}', 0), "half a surrogate pair"),
    "an unknown escape": (written('{"\\x":1}', 0), "an unknown escape"),
    "a number beyond doubles": (written(one(x="1e309"), 4), "number out of range"),
    "too deep": (written(one(x="[" * 126 + "]" * 126), 4), "deeper than 127"),
    "a tensor that is none": (written('{"a":1}', 0), "else than an object for tensor 'a'"),
    "a field twice": (written(one(data_offsets='[0,4],"shape":[1]'), 4), "'a' has shape twice"),
    "a missing field": (written('{"a":{"dtype":"F32","shape":[]}}', 0), "'a' has no data_offsets"),
    "an unknown dtype": (written(one(dtype="[]"), 4), "no text for the dtype of"),
    "a dtype in lower case": (written(one().lower(), 4), "the unknown dtype 'f32'"),
    "a negative dimension": (
        written(one(shape="[-1]"), 4),
        "shape of tensor 'a' has '-1', which is not an unsigned integer of 64 bits",
    ),
    "a dimension of 65 bits": (
        written(one(shape="[18446744073709551616]"), 4),
        "has '18446744073709551616', which is not",
    ),
    "a fraction": (written(one(shape="[1.0]"), 4), "has '1.0', which is not"),
    "one offset": (written(one(data_offsets="[4]"), 4), r"are \[4\], not two"),
    "a product that overflows": (
        written(one(shape="[4294967296,4294967296]"), 4),
        r"of shape \[4294967296, 4294967296\] has more bits than 64 bits count",
    ),
    "half a byte": (
        written('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', 1),
        r"of F4 and shape \[3\] does not end on a byte",
    ),
    "a size that is not the shape's": (
        written(one(shape="[2]"), 4),
        r"at \[0, 4\) should have 8 bytes, being F32 of shape \[2\]",
    ),
    "an end before the start": (
        written(two(data_offsets="[4,0]"), 4),
        "'b' at .4, 0. ends before it starts",
    ),
    "a hole": (
        written(two(data_offsets="[5,9]"), 9),
        r"'b' at \[5, 9\) leaves a hole from 4 on",
    ),
    "an overlap": (
        written(two(data_offsets="[2,6]"), 6),
        r"'b' at \[2, 6\) overlaps the one in front of it, which ends at 4",
    ),
    "bytes nobody owns": (
        written(one(), 5),
        "the tensors end at byte 4 of the data, which has 5 bytes",
    ),
    "bytes that are missing": (written(one(), 3), "end at byte 4 .* which has 3 bytes"),
    "metadata of numbers": (written('{"__metadata__":{"k":1}}', 0), "else than text for 'k'"),
    "metadata that is a list": (written('{"__metadata__":[]}', 0), "no object for '__metadata__'"),
    "metadata twice": (
        written('{"__metadata__":{},"__metadata__":{}}', 0),
        "'__metadata__' occurs twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    file, message = BAD[case]
    assert reference(file) is None
    with pytest.raises(ak.IntegrityError, match=message):
        _C.parse_safetensors(file)
    path = tmp_path / "model.safetensors"
    path.write_bytes(file)
    with pytest.raises(ak.IntegrityError, match=f"{path}: .*{message}"):
        ak.Checkpoint.open(path)


UNUSUAL = {
    "nothing": ("{}", 0),
    "space around": (" \t\r\n{ } \n", 0),
    "metadata of null": ('{"__metadata__":null}', 0),
    "an escaped metadata key": ('{"\\u005f_metadata__":{"a":"b"}}', 0),
    "a metadata key twice": ('{"__metadata__":{"a":"b","a":"c"}}', 0),
    "a tensor as a list": ('{"a":["F32",[1],[0,4]]}', 4),
    "a dtype as an object": (one(dtype='{"F32":null}'), 4),
    "unknown fields": (one(x="[" * 125 + "]" * 125), 4),
    "a name twice": (f'{{"a":{tensor(shape="[7]")},"a":{tensor()}}}', 4),
    "no name": (f'{{"":{tensor()}}}', 4),
    "a scalar": (one(shape="[]"), 4),
    "no elements": (one(shape="[0,18446744073709551615]", data_offsets="[0,0]"), 0),
    "tensors in any order": (f'{{"b":{tensor(data_offsets="[4,8]")},"a":{tensor()}}}', 8),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_the_reference_accepts_is_accepted(case: str) -> None:
    file = written(*UNUSUAL[case])
    assert reference(file) is not None
    assert ours(file) == reference(file)


def test_a_name_in_a_message_is_short_and_printable() -> None:
    name = "\\u0000é" * 100
    with pytest.raises(ak.IntegrityError) as caught:
        _C.parse_safetensors(written(f'{{"{name}":1}}', 0))
    assert "'\\x00é\\x00é" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_metadata_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(written('{"__metadata__":{"format":"pt","k":"\\u00e9\\ud83d\\ude00"}}', 0))
    with safetensors.safe_open(path, framework="numpy") as file:
        expected = file.metadata()
    assert dict(ak.Checkpoint.open(path).files[0].metadata) == expected
    assert expected == {"format": "pt", "k": "é😀"}


def test_a_header_of_fifty_thousand_tensors_is_read() -> None:
    members = [
        f'"layer.{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'
        for i in range(50_000)
    ]
    file = written("{" + ",".join(members) + "}", 50_000)
    assert ours(file) == reference(file)
