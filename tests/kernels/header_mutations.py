"""Safetensors files, valid ones and spoilt ones, for comparing two readers of their headers.

The spoiling knows the format: it reaches every rule, and what each rule borders on, far more often
than flipped bytes alone would.
"""

from __future__ import annotations

import json
import math
from random import Random

BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8}
BITS |= {"F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16}
BITS |= {"F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64}
BITS |= {"I64": 64, "U64": 64}
DTYPES = list(BITS)

NAMES = ["a", "b", "model.layers.0.w", "lm_head", "", "é", "\\u00e9", "\\ud83d\\ude00", "\\n"]
SPACES = ["", "", "", " ", "\n", "\t", "\r", "  "]
NUMBERS = ["0", "1", "2", "3", "-1", "-0", "01", "00", "1.0", "1e2", "0e0", "1E+2", "2e-1", "0.5"]
NUMBERS += ["4294967296", "9223372036854775808", "18446744073709551615", "18446744073709551616"]
NUMBERS += ["1e308", "1e309", "17e307", "18e307", "1e-400", "1e400", "0e999999999999", "-1e999"]
NUMBERS += ["1797693134862315708e290", "1797693134862315808e290", "18446744073709551615e289"]
NUMBERS += ["1" * 40, "1" * 400, "0." + "9" * 30 + "e308", "9" * 20 + ".9e289", "1e", "1.", ".1"]
NUMBERS += ["+1", "0x1", "1e+", "NaN", "Infinity", "1e2147483648", "1e-2147483648", "--1", "1_0"]
TEXTS = ['""', '"x"', '"\\u0041"', '"\\ud800"', '"\\udc00"', '"\\ud800\\udc00"', '"\\ud800\\u0041"']
TEXTS += ['"\\x"', '"\\u12"', '"\\u 123"', '"\\u+123"', '"a\tb"', '"\x7f"', '"\x00"', '"é"']
TEXTS += ['"\\"\\\\\\/\\b\\f\\n\\r\\t"', '"', "'a'", '"\\', '"\\u', '"\\ud800\\', '"F32"', '"bf16"']
WORDS = ["null", "true", "false", "nul", "nulll", "True", "[]", "{}", "[,]", "[1,]", "{,}", "[1 2]"]
WORDS += ['{"a":1,}', '{"a" 1}', '{"a":}', "{1:2}", '{"F32":null}', '{"F32":{}}', "[[0]]"]
FRAGMENTS = ["{", "}", "[", "]", '"', ",", ":", "\\", " ", "\0", "\ufeff", "__metadata__", "dtype"]
FRAGMENTS += [*NUMBERS, *TEXTS, *WORDS]
BAD_UTF8 = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"]
BAD_UTF8 += [b"\xf0\x8f\xbf\xbf", b"\xe0\x9f\xbf", b"\xc3", b"\xf5\x80\x80\x80"]
GOOD_UTF8 = [
    b"\xc2\x80",
    b"\xef\xbf\xbf",
    b"\xed\x9f\xbf",
    b"\xf4\x8f\xbf\xbf",
    b"\xf0\x90\x80\x80",
]


def file_of(header: bytes, data_bytes: int = 0) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(i & 255 for i in range(data_bytes))


class Headers:
    """An endless supply, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def next_file(self) -> bytes:
        random = self._random
        fields, end = self._tensors()
        entries = [(self._name(i), tensor) for i, tensor in enumerate(fields)]
        if random.random() < 0.5:
            entries = self._spoil_tensors(entries)
        members = [(name, self._write_tensor(tensor)) for name, tensor in entries]
        if random.random() < 0.3:
            place = random.randrange(len(members) + 1)
            members.insert(place, ("__metadata__", self._metadata()))
        if random.random() < 0.1 and members:
            members.append(random.choice(members))
        if random.random() < 0.3:
            random.shuffle(members)
        space = random.choice(SPACES)
        pairs = [f'{space}"{name}"{space}:{space}{value}{space}' for name, value in members]
        header = f"{random.choice(SPACES)}{{{','.join(pairs)}}}{random.choice(SPACES)}".encode()
        if random.random() < 0.25:
            header = self._spoil_bytes(header)
        if random.random() < 0.05:
            end += random.choice([-1, 1, 8])
        file = file_of(header, max(end, 0))
        return self._spoil_file(file) if random.random() < 0.04 else file

    def _tensors(self) -> tuple[list[list[str]], int]:
        """[dtype, shape, begin, end] as they are written, and the end of the last."""
        random = self._random
        tensors, end = [], 0
        for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            dtype = random.choice(DTYPES)
            shape = [random.choice([0, 1, 2, 3, 4, 8]) for _ in range(random.randrange(4))]
            if BITS[dtype] < 8:
                shape.append(4)
            begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
            if end > 300:
                return tensors, begin
            tensors.append([f'"{dtype}"', json.dumps(shape), str(begin), str(end)])
        return tensors, end

    def _name(self, index: int) -> str:
        random = self._random
        return f"t{index}" if random.random() < 0.7 else random.choice(NAMES)

    def _spoil_tensors(self, entries: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
        random = self._random
        if not entries:
            return entries
        at = random.randrange(len(entries))
        name, tensor = entries[at]
        tensor = list(tensor)
        kind = random.randrange(10)
        if kind == 0:
            tensor[0] = random.choice([*TEXTS, *WORDS, "1", f'"{random.choice(DTYPES).lower()}"'])
        elif kind == 1:
            tensor[0] = f'"{random.choice(DTYPES)}"'
        elif kind == 2:
            tensor[1] = random.choice([*WORDS, *NUMBERS, *TEXTS])
        elif kind in (3, 4):
            dims = tensor[1][1:-1].split(",")
            dims[random.randrange(len(dims))] = random.choice([*NUMBERS, *NUMBERS, *WORDS, *TEXTS])
            if random.random() < 0.3:
                dims.insert(random.randrange(len(dims) + 1), random.choice(["1", "0", *NUMBERS]))
            tensor[1] = f"[{','.join(dims)}]"
        elif kind in (5, 6):
            which = random.choice([2, 3])
            moved = int(tensor[which]) + random.choice([-8, -1, 1, 8])
            tensor[which] = random.choice([str(moved), str(max(moved, 0)), *NUMBERS])
        elif kind == 7:
            tensor[2], tensor[3] = tensor[3], tensor[2]
        elif kind == 8:  # after this place everything is moved
            return [*entries[:at], *entries[at + 1 :]]
        else:
            other = random.choice(entries)[1]
            tensor[2:] = other[2:]
        return [*entries[:at], (name, tensor), *entries[at + 1 :]]

    def _write_tensor(self, tensor: list[str]) -> str:
        random = self._random
        dtype, shape, begin, end = tensor
        offsets = f"[{begin},{end}]"
        unusual = random.random()
        if unusual < 0.04:
            fields = [dtype, shape, offsets, random.choice(WORDS)]
            return f"[{','.join(fields[: random.choice([2, 3, 3, 3, 4])])}]"
        if unusual < 0.06:
            dtype = random.choice([f"{{{dtype}:null}}", f"{{{dtype}:{random.choice(WORDS)}}}"])
        if unusual < 0.08:
            offsets = random.choice([f"[{begin}]", f"[{begin},{end},{end}]", "[]", f'"{begin}"'])
        members = [f'"dtype":{dtype}', f'"shape":{shape}', f'"data_offsets":{offsets}']
        if unusual > 0.9:
            members.append(f'"{random.choice(["x", "dtyp", "shape ", "e"])}":{self._value()}')
        elif unusual > 0.87:
            members.append(random.choice(members))
        elif unusual > 0.84:
            members.pop(random.randrange(3))
        if random.random() < 0.5:
            random.shuffle(members)
        return f"{{{','.join(members)}}}"

    def _value(self) -> str:
        random = self._random
        kind = random.randrange(6)
        if kind == 0:
            depth = random.choice([1, 5, 60, 123, 124, 125, 126, 127, 200])
            if random.random() < 0.5:
                return "[" * depth + "]" * depth
            return '{"a":' * depth + "1" + "}" * depth
        if kind == 1:
            return random.choice(TEXTS)
        if kind == 2:
            return random.choice(WORDS)
        if kind == 3:
            return f"{random.randrange(10**19)}e{random.randrange(286, 312)}"
        if kind == 4:
            return f"{random.random()}e{random.randrange(-330, 330)}"
        return random.choice(NUMBERS)

    def _metadata(self) -> str:
        random = self._random
        if random.random() < 0.2:
            return random.choice([*WORDS, *NUMBERS, *TEXTS])
        texts = ['"pt"', '"x"', '"x"', *TEXTS]
        values = [random.choice(texts if random.random() < 0.3 else texts[:3]) for _ in range(2)]
        if random.random() < 0.1:
            values[0] = self._value()
        return f'{{"format":{values[0]},"{random.choice(["format", "k"])}":{values[1]}}}'

    def _spoil_bytes(self, header: bytes) -> bytes:
        random = self._random
        spoilt = bytearray(header)
        for _ in range(random.choice([1, 1, 1, 2, 4])):
            at = random.randrange(len(spoilt) + 1)
            kind = random.randrange(6)
            if kind == 0:
                spoilt[at : at + 1] = bytes([random.randrange(256)])
            elif kind == 1:
                del spoilt[at : at + random.choice([1, 1, 1, 2, 8])]
            elif kind == 2:
                spoilt[at:at] = random.choice(FRAGMENTS).encode()
            elif kind == 3:
                spoilt[at:at] = random.choice([*BAD_UTF8, *GOOD_UTF8])
            elif kind == 4:
                end = random.randrange(at, len(spoilt) + 1)
                spoilt[at:at] = spoilt[at:end]
            else:
                spoilt[at:at] = bytes([random.choice(b' \n\t\r\x0b\x0c,:{}[]"0')])
        return bytes(spoilt)

    def _spoil_file(self, file: bytes) -> bytes:
        random = self._random
        kind = random.randrange(4)
        if kind == 0:
            return file[: random.randrange(len(file))]
        if kind == 1:
            return file + bytes(random.choice([1, 8, 100]))
        if kind == 2:
            length = int.from_bytes(file[:8], "little") + random.choice([-8, -1, 1, 8])
            return max(length, 0).to_bytes(8, "little") + file[8:]
        limits = [0, 100_000_000, 100_000_001, 1 << 32, (1 << 64) - 8, (1 << 64) - 1]
        return random.choice(limits).to_bytes(8, "little") + file[8:]
