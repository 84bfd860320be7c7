"""Recorded workloads as files: CSV, and the JSONL that load generators replay.

CSV: a header with `Request Time` (seconds), `Model Name`, `Input Length`, `Output Length`; shorter
names (`time`, `model`, `input length`, `output length`) and underscores are taken too. JSONL: one
object a line with `timestamp` (milliseconds), `model`, `input_length`, `output_length`; the model
and the output length may stand in a `payload` as it is sent (`model`, `max_tokens`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aegaeon.core.errors import ConfigError
from aegaeon.sim.simulator import Request

CSV_COLUMNS = ("Request Time", "Model Name", "Input Length", "Output Length")
_SHORT = {
    "request time": 0, "time": 0, "model name": 1, "model": 1,
    "input length": 2, "output length": 3,
}  # fmt: skip


def read_trace(path: str | Path) -> list[Request]:
    """The requests of a `.csv` or `.jsonl` file in order of time, which need not be the file's.

    Raises ConfigError with the file and line of the first fault.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: expected a file that ends in .csv or .jsonl")
    try:
        requests = list(reader(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason}") from None
    except csv.Error as error:
        raise ConfigError(f"{path}: not CSV: {error}") from None
    if not requests:
        raise ConfigError(f"{path}: no requests; expected at least one line of data")
    return sorted(requests, key=lambda request: request.at_s)


def write_trace(path: str | Path, requests: Iterable[Request]) -> None:
    """Write a `.csv` or `.jsonl` file. Raises ValueError for another ending."""
    path = Path(path)
    if path.suffix.lower() == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            writer.writerows((repr(r.at_s), *r[1:]) for r in requests)
    elif path.suffix.lower() == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            for request in requests:
                line = {
                    "timestamp": request.at_s * 1e3,
                    "model": request.model,
                    "input_length": request.input_tokens,
                    "output_length": request.output_tokens,
                }
                file.write(json.dumps(line) + "\n")
    else:
        raise ValueError(f"expected a name that ends in .csv or .jsonl, got {str(path)!r}")


def _read_csv(path: Path) -> Iterator[Request]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        places: dict[int, int] = {}
        for place, title in enumerate(header):
            column = _SHORT.get(" ".join(title.replace("_", " ").lower().split()))
            if column is not None:
                places[column] = place
        missing = [CSV_COLUMNS[column] for column in range(4) if column not in places]
        if missing:
            raise ConfigError(
                f"{path}:1: got the columns {', '.join(header) or 'none'}; expected "
                f"{', '.join(CSV_COLUMNS)}: {', '.join(missing)} missing"
            )
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise ConfigError(
                    f"{where}: got {len(row)} values; expected {len(header)}, one per column"
                )
            cells = [row[places[column]] for column in range(4)]
            yield _request(where, CSV_COLUMNS, cells, 1.0)


def _read_jsonl(path: Path) -> Iterator[Request]:
    names = ("timestamp", "model", "input_length", "output_length")
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            where = f"{path}:{line}"
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: got {text.strip()[:40]}; expected an object")
            payload = row.get("payload")
            sent = payload if isinstance(payload, dict) else {}
            inherited = {"model": sent.get("model"), "output_length": sent.get("max_tokens")}
            values = [row.get(name, inherited.get(name)) for name in names]
            yield _request(where, names, values, 1e-3)


def _request(where: str, names: tuple[str, ...], values: list[Any], unit_s: float) -> Request:
    def number(place: int, parse: Callable[[Any], float], accepted: str) -> float:
        value = values[place]
        try:
            if isinstance(value, bool) or value is None:
                raise ValueError
            parsed = parse(value)
        except (ValueError, TypeError, OverflowError):
            raise _fault(where, names[place], value, accepted) from None
        if not parsed >= (1 if place else 0) or parsed == math.inf:
            raise _fault(where, names[place], value, accepted)
        return parsed

    model = values[1]
    if not isinstance(model, str) or not model.strip():
        raise _fault(where, names[1], model, "the name of a model")
    return Request(
        number(0, float, "a time of 0 or more") * unit_s,
        model.strip(),
        int(number(2, _whole, "a whole number of tokens, at least 1")),
        int(number(3, _whole, "a whole number of tokens, at least 1")),
    )


def _whole(value: Any) -> int:
    if isinstance(value, float) and value != int(value):
        raise ValueError
    return int(value)


def _fault(where: str, name: str, value: Any, accepted: str) -> ConfigError:
    got = "nothing" if value is None else repr(value)
    return ConfigError(f"{where}: {name}: got {got}; expected {accepted}")
