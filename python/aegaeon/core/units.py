"""Sizes and durations as people write them: '20GiB', '90%', '10m'.

Every parser raises ValueError whose message says what form is accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BYTE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
SECOND_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

SIZE_FORM = "a size such as '20GiB', '512MiB' or plain bytes"
SIZE_OR_SHARE_FORM = "a share such as '90%', or a size such as '20GiB' or plain bytes"
DURATION_FORM = "a duration such as '10m', '1h30m', '250ms' or plain seconds"
KEEP_ALIVE_FORM = f"{DURATION_FORM}; 0 for not at all, -1 for ever"

_NUMBER = r"\d+(?:\.\d+)?"
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")
_SHARE = re.compile(rf"({_NUMBER})\s*%")
_DURATION_PART = re.compile(rf"({_NUMBER})(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_NUMBER}(?:ms|s|m|h|d))+")


def parse_bytes(value: int | str) -> int:
    """'16MiB' -> 16777216. Binary (KiB ...) and decimal (KB ...) units in any case; a number is
    bytes.

    Raises ValueError for anything else, and for a size of less than one byte.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size_bytes = value
    else:
        match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
        unit = BYTE_UNITS.get(match[2].upper() or "B") if match else None
        if match is None or unit is None:
            raise ValueError(f"expected {SIZE_FORM}")
        size_bytes = round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size_bytes < 1:
        raise ValueError(f"expected {SIZE_FORM}, more than nothing")
    return size_bytes


def format_bytes(size_bytes: int) -> str:
    """In the largest binary unit that leaves at least 1, three significant digits: '1.5 GiB', '64
    MiB', '0 B'.
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    size, step = float(size_bytes), 0
    while abs(size) >= 1024 and step < len(units) - 1:
        size, step = size / 1024, step + 1
    digits = max(0, 3 - len(str(int(abs(size))))) if step else 0
    text = f"{size:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} {units[step]}"


def parse_duration(value: float | str) -> float:
    """'1h30m' -> 5400.0 seconds; a plain number is seconds. Raises ValueError for anything else."""
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(_NUMBER, text):
            return float(text)
        if _DURATION.fullmatch(text):
            return sum(float(n) * SECOND_UNITS[unit] for n, unit in _DURATION_PART.findall(text))
    elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12:
        return float(value)
    raise ValueError(f"expected {DURATION_FORM}")


def parse_keep_alive(value: float | str) -> float | None:
    """As `parse_duration`, in seconds; None, written -1, means that time alone never ends it."""
    if value in (-1, "-1") and not isinstance(value, bool):
        return None
    try:
        return parse_duration(value)
    except ValueError:
        raise ValueError(f"expected {KEEP_ALIVE_FORM}") from None


@dataclass(frozen=True)
class MemoryBudget:
    """A share of a memory whose size is not known yet, or an absolute size; exactly one is set."""

    share: float | None = None
    size_bytes: int | None = None

    @classmethod
    def parse(cls, value: int | str) -> MemoryBudget:
        """'90%', '20GiB' or plain bytes. Raises ValueError for anything else."""
        match = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None:
            share = float(match[1]) / 100
            if not 0 < share <= 1:
                raise ValueError(f"expected {SIZE_OR_SHARE_FORM}, above 0% and at most 100%")
            return cls(share=share)
        try:
            return cls(size_bytes=parse_bytes(value))
        except ValueError:
            raise ValueError(f"expected {SIZE_OR_SHARE_FORM}") from None

    def resolve(self, total_bytes: int) -> int:
        """The budget in bytes, of a memory of `total_bytes`. An absolute size is not capped."""
        if self.size_bytes is not None:
            return self.size_bytes
        assert self.share is not None
        return int(total_bytes * self.share)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return str(self.size_bytes) if self.share is None else f"{self.share * 100:g}%"
