"""What memory shows when an owner gets it."""

from __future__ import annotations

from typing import Literal

from aegaeon_kernels import _C

Contents = Literal["zero", "poison", "preserve"]
_CONTENTS = {
    "zero": _C.Contents.ZERO,
    "poison": _C.Contents.POISON,
    "preserve": _C.Contents.PRESERVE,
}


def native_contents(contents: Contents) -> _C.Contents:
    """Raises ValueError."""
    if contents not in _CONTENTS:
        raise ValueError(f"contents={contents!r} is none of {', '.join(_CONTENTS)}")
    return _CONTENTS[contents]
