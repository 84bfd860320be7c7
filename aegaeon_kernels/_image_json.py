"""The JSON that goes with an image: strict, bounded, in one form only.

It comes from files that anybody may have written, so nothing is believed before it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from aegaeon_kernels import _C

Metadata = Mapping[str, str | int]

INT64 = range(-(1 << 63), 1 << 63)


def encode_metadata(metadata: Metadata) -> bytes:
    """Sorted, without spaces; nothing at all for an empty mapping.

    Raises ValueError for what is not str -> str | int (of 64 bits), or too long.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not key:
            raise ValueError(f"metadata key {key!r} is not a name")
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(f"metadata {key!r} is {value!r}: neither str nor int")
        if isinstance(value, int) and value not in INT64:
            raise ValueError(f"metadata {key!r} is {value}: it does not fit 64 bits")
    if not metadata:
        return b""
    text = json.dumps(dict(metadata), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    encoded = text.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    if len(encoded) > _C.MAX_METADATA_BYTES:
        raise ValueError(
            f"metadata of {len(encoded)} bytes, over the limit of {_C.MAX_METADATA_BYTES}"
        )
    return encoded


def decode_metadata(encoded: bytes) -> Metadata:
    """What encode_metadata() made of it. Raises ValueError for anything else."""
    if not encoded:
        return MappingProxyType({})
    parsed = _parse(encoded)
    if not isinstance(parsed, dict):
        raise ValueError("metadata is not an object")
    if encode_metadata(parsed) != encoded:
        raise ValueError("metadata is not in the form in which it is written")
    return MappingProxyType(parsed)


def check_json(encoded: bytes) -> None:
    """Raise ValueError unless it is JSON in UTF-8 by the standard, or nothing at all."""
    if encoded:
        _parse(encoded)


def _parse(encoded: bytes) -> Any:
    try:
        return json.loads(encoded.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
