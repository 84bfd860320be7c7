"""How long until a model that was put to sleep is back, against vLLM and torch_memory_saver?

Limit: the link. 15 GiB at 50 GB/s are 0.32 s. What is above it is mapping (ours reuses handles),
waiting, and copies that overlap with nothing. Putting it to sleep needs no copy, since weights do
not change: the host image stays. Peers run in processes of their own (peers/), with tensors of the
sizes that the layers of an 8B model have, pinned backups, and a first cycle that is told apart.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from measure import quantiles
from setting import Result, Setting, Skipped, Stopwatch, model

PEERS = {"vLLM CuMemAllocator": "cumem.py", "torch_memory_saver": "memory_saver.py"}


def measure_restore(setting: Setting) -> Iterator[Result]:
    ours = _arena(setting)
    yield ours
    for name, program in PEERS.items():
        try:
            yield _peer(setting, name, program, ours["wake_ms_p50"])
        except Skipped as skipped:
            yield {"result": f"sleep and wake, {name}", "skipped": str(skipped)}


def _arena(setting: Setting) -> Result:
    watch = Stopwatch()
    with model(setting) as ours:
        for _ in range(setting.rounds + 1):
            with watch("wake"):
                with watch("map"):
                    ours.map()
                with watch("load"):
                    ours.load()
            ours.check()
            stored = ours.prefetcher.stats().store.bytes
            with watch("sleep"):
                ours.region.unmap()
            copied = ours.prefetcher.stats().store.bytes - stored
            if copied:
                raise AssertionError(
                    f"{copied} bytes were copied out of weights that do not change"
                )
        handles = ours.arena.stats().num_handles + ours.arena.stats().num_tail_handles
    figures: dict[str, Any] = {
        "result": "sleep and wake, arena",
        "model_bytes": setting.model_bytes,
        "handles": handles,
        "sleep_bytes_copied": copied,
        "first_wake_ms": watch["wake"][0] * 1e3,  # creates the handles
    }
    for phase, seconds in watch.seconds.items():
        figures |= quantiles(f"{phase}_ms", seconds[1:])
    return figures


def _peer(setting: Setting, name: str, program: str, ours_ms: float) -> Result:
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "peers" / program),
            str(setting.device.name),
            str(setting.model_bytes),
            str(setting.rounds + 1),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{program}: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "skipped" in answer:
        raise Skipped(answer["skipped"])
    figures = {
        "result": f"sleep and wake, {name}",
        "model_bytes": setting.model_bytes,
        "version": answer["version"],
        "first_sleep_ms": answer["sleep_s"][0] * 1e3,  # pins the backup, where it is kept
        "first_wake_ms": answer["wake_s"][0] * 1e3,
    }
    for phase in ("sleep", "wake"):
        figures |= quantiles(f"{phase}_ms", answer[f"{phase}_s"][1:])
    figures["wake_of_ours"] = median(answer["wake_s"][1:]) * 1e3 / ours_ms
    return figures
