"""`bench/gpu/e2e/run.py` runs to its end on a machine without a GPU, with tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.soak, pytest.mark.timeout(900)]

PROGRAM = Path(__file__).parents[2] / "bench" / "gpu" / "e2e" / "run.py"


def test_a_dry_run_says_something_of_every_part_and_finds_no_difference(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--dry-run", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu_e2e.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"exactness", "paths", "goodput"}
    assert all(line["dry_run"] and "error" not in line for line in lines)
    [exactness] = [line for line in lines if line["part"] == "exactness"]
    assert exactness["exact"]
    assert exactness["switches"] >= 36
    assert sum("skipped" in line for line in lines) == 2  # vLLM's sleep mode needs a GPU


def test_figures_of_a_dry_run_are_no_results():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--dry-run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--dry-run needs --out" in done.stderr
