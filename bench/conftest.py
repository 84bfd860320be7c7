"""How the benches are collected, and how a result is printed and kept.

A bench is `bench_*.py`; its tests check that the answer is right before they read a clock. Each
result goes through `record`: it lands in pytest-benchmark's `extra_info`, in the list at the end,
and, with `--keep-results`, as one line in `results/<bench>.jsonl` with what it was measured on.
"""

import json
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import measure
import pytest

RESULTS = Path(__file__).parent / "results"

_rows: list[tuple[str, dict[str, Any]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep-results",
        action="store_true",
        help="append each result of bench/ as a JSON line to bench/results/",
    )


def pytest_configure() -> None:
    """A terminated run ends the servers it has started, like an interrupted one."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect bench_*.py also where pytest is not told to: `pytest bench`."""
    told = parent.session.isinitpath(file_path) or any(
        file_path.match(pattern) for pattern in parent.config.getini("python_files")
    )
    if told or not file_path.match("bench_*.py"):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _rows:
        terminalreporter.section("results")
    for name, values in _rows:
        terminalreporter.write_line(name)
        for key, value in values.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            terminalreporter.write_line(f"  {key:<28} {shown}")


@pytest.fixture(scope="session")
def measured_on() -> dict[str, Any]:
    return measure.environment()


@pytest.fixture
def record(request: pytest.FixtureRequest, measured_on: dict[str, Any]) -> Callable[..., None]:
    """record(name, benchmark, **values): one result; `benchmark` may be None."""
    bystanders = measure.Bystanders()

    def keep(name: str, benchmark: Any, **values: Any) -> None:
        values = {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in values.items()
        }
        if benchmark is not None:
            benchmark.extra_info.update(values)
        _rows.append((name, values))
        if request.config.getoption("--keep-results"):
            line = {
                "result": name,
                **values,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "others_busy_cores": round(bystanders.busy_cores(), 2),
                **measured_on,
            }
            RESULTS.mkdir(exist_ok=True)
            with (RESULTS / f"{request.path.stem}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    return keep
