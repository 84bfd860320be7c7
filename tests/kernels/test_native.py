"""The native test program (csrc/tests): a case of each of its tests, in two sizes.

It is built once, in a folder that is kept; `make sanitize` builds and runs it under sanitizers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from native_support import CSRC

NAMES = re.findall(r'^    \{"(\w+)", \{', (CSRC / "tests" / "main.cpp").read_text(), re.MULTILINE)

# What the core asks of a driver, in the text of csrc.
CALL = re.compile(
    r"\bdriver(?:_|\(\))?(?:->|\.)"
    r"((?:mem|address|host|stream|memcpy|memset|event)_\w+|memory_info)\("
)
# Calls that cannot fail in the sweep, and why.
NOT_SWEPT = {
    ("vmm/torch_hooks.cpp", "*"): "torch's own allocator calls, of test_torch_pool_random.cpp",
    ("kv/page_copy.cpp", "*"): "asks no driver",
    # Of work that nobody could wait for when its region ended; no operation of the sweep leaves it.
    ("vmm/quarantine.cpp", "event_query"): "not swept yet",
    ("vmm/arena.cpp", "event_synchronize"): "not swept yet",
    ("vmm/arena.cpp", "stream_synchronize"): "in the arena's end not swept yet",
}


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def sweep(native_program: Path) -> str:
    return run(native_program, "fault_sweep")


def test_the_program_lists_the_tests_it_has(native_program: Path) -> None:
    listed = [line.split()[0] for line in run(native_program, "--list").splitlines()]
    assert listed == NAMES
    described = (CSRC / "tests" / "CMakeLists.txt").read_text()
    assert all(f"\n    {name}\n" in described or f"\n    {name})" in described for name in NAMES)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fault_sweep"])
def test_native(native_program: Path, name: str) -> None:
    assert f"ok      {name}=" in run(native_program, name)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_native_at_length(native_program: Path, name: str) -> None:
    output = run(native_program, "--soak", name)
    print(output)
    assert f"ok      {name}=" in output


@pytest.mark.timeout(600)
def test_twenty_thousand_failures_cost_nobody_anything(sweep: str) -> None:
    assert "ok      fault_sweep=" in sweep
    (runs,) = re.findall(r"(\d+) runs over (\d+) operations", sweep)
    assert int(runs[0]) >= 20_000
    assert int(runs[1]) >= 14


def calls_in_the_text() -> Iterator[tuple[str, int, str]]:
    """(file, line, call), every place in csrc that calls a driver on somebody's behalf."""
    files = [
        *CSRC.glob("vmm/*.[ch]pp"),
        *CSRC.glob("transfer/*.[ch]pp"),
        CSRC / "driver/stream.hpp",
    ]
    for path in sorted(files):
        name = str(path.relative_to(CSRC))
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            for call in CALL.findall(line.split("//")[0]):
                yield name, number, call


def failed_in(program: Path, sweep: str) -> dict[tuple[str, str], list[int]]:
    """(file, call) -> lines whose call has failed in the sweep."""
    sites = re.findall(r"^site (\w+) (0x[0-9a-f]+)$", sweep, re.MULTILINE)
    # A return address is behind its call.
    addresses = [hex(int(address, 16) - 1) for _, address in sites]
    places = subprocess.run(
        ["addr2line", "-e", program, *addresses], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    lines: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (call, _), place in zip(sites, places, strict=True):
        path, _, rest = place.rpartition(":")
        name = os.path.relpath(path, CSRC)
        lines[name, call].append(int(re.match(r"\d+", rest)[0]) if rest[0].isdigit() else 0)
    return lines


@pytest.mark.skipif(shutil.which("addr2line") is None, reason="needs binutils")
@pytest.mark.timeout(600)
def test_every_place_that_calls_the_driver_has_failed(native_program: Path, sweep: str) -> None:
    failed = failed_in(native_program, sweep)
    missing = [
        f"{name}:{number} {call}"
        for name, number, call in calls_in_the_text()
        if not any(abs(line - number) <= 2 for line in failed[name, call])
        and (name, "*") not in NOT_SWEPT
        and (name, call) not in NOT_SWEPT
    ]
    assert missing == []
