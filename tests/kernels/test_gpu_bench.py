"""The GPU benches run from end to end without a GPU, with tiny sizes: host device and stub library.

What only torch for CUDA can do is left out there, and says so in the results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_support import StubCuda

BENCH = Path(__file__).parents[2] / "bench"
PROGRAM = BENCH / "gpu" / "run.py"
MODES = ("alone", "loading", "loading at half the rate", "storing", "loading and storing")
MEASURED = {
    *(f"driver calls, handles of {mib} MiB" for mib in (2, 4, 8, 16, 32, 64, 128)),
    "pinning, thp",
    "pinning, pageable",
    "load against the best plain pinned copy",
    "loading and storing at once",
    "cancelling a load",
    "sleep and wake, arena",
    *(f"decoding (matrix products on the host), {mode}" for mode in MODES),
}
KV = {
    *(f"KV pages of {size} bytes" for size in (512, 2048, 4096, 16384, 65536, 524288)),
    *(
        f"swap of scattered blocks, each {one}"
        for one in ("one page of 2 MiB", "64 pages of 32 KiB")
    ),
    "compaction of a pool, half of it live",
    *(
        f"decoding (matrix products on the host) beside compaction, {name}"
        for name in ("alone", "8_programs", "32_programs", "full_grid")
    ),
}
NO_CUDA = {"sleep and wake, vLLM CuMemAllocator", "sleep and wake, torch_memory_saver", "decode"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=250
    )


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    return {line["result"]: line for line in lines}


@pytest.mark.parametrize("kind", ["host", "stub"])
def test_a_dry_run_measures_all_that_needs_no_torch_for_cuda(
    kind: str, stub_cuda: StubCuda, tmp_path: Path
) -> None:
    device = ["--device", "cuda:0", "--library", stub_cuda.path] if kind == "stub" else []
    done = run("--dry-run", "--out", str(tmp_path), *device)
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path)
    measured = {name for name, line in lines.items() if "skipped" not in line}
    assert measured >= MEASURED
    assert ("pinning, numa" in measured) == (kind == "stub")
    no_cuda = NO_CUDA if kind == "host" else NO_CUDA | {"kv"}
    assert measured & KV == (KV if kind == "host" else set())
    for name in no_cuda:
        assert lines[name]["skipped"] == "torch has no CUDA device here"
    assert measured | no_cuda | {"pinning, numa", "pinning, hugetlb"} >= lines.keys()
    for line in lines.values():
        assert line["device"] == ("cuda:0" if kind == "stub" else "host")
        assert line["dry_run"] is True
        assert {"commit", "torch", "date", "gpu_name", "gpu_driver_version"} <= line.keys()
    assert lines["sleep and wake, arena"]["sleep_bytes_copied"] == 0


def test_what_cannot_be_measured_is_a_result_and_costs_nothing_else(
    stub_cuda: StubCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_CUDA_BYTES", str(64 << 20))  # too little for the table of calls
    device = ["--device", "cuda:0", "--library", stub_cuda.path]
    only = ["--only", "driver_calls", "--only", "transfers"]
    done = run("--dry-run", "--out", str(tmp_path), *device, *only)
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path)
    assert "GiB of device memory" in lines["driver_calls"]["skipped"]
    assert "cancelling a load" in lines
    done = run("--dry-run", "--out", str(tmp_path), "--device", "cuda:7", *device[2:])
    assert done.returncode != 0
    assert "no device cuda:7" in done.stderr


def test_a_dry_run_does_not_write_among_the_results() -> None:
    done = run("--dry-run")
    assert done.returncode == 2
    assert "--dry-run needs --out" in done.stderr
