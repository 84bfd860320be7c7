"""Runs the GPU measurements and writes a JSON line for each result.

    python bench/gpu/run.py                        all of it, on cuda:0; to bench/results/gpu.jsonl
    python bench/gpu/run.py --only restore         one of it
    python bench/gpu/run.py --dry-run --out DIR    every line of code with tiny sizes, without a GPU

What cannot be measured is a line too, with the reason under `skipped`, and so is what went wrong,
under `error`; then the exit status is 1. Needs the packages of the extras `bench` and `dev`, torch
for CUDA, and, to be compared with them, vllm and torch_memory_saver; about 20 GiB of free device
memory (kv: 42) and 40 GiB of host memory. Takes some 10 minutes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # measure.py serves the other benches too

from decode import measure_decode
from driver_calls import measure_driver_calls
from kv import measure_kv
from measure import Bystanders, environment
from pinning import measure_pinning
from restore import measure_restore
from setting import Result, Setting, Skipped
from transfers import measure_transfers

import aegaeon_kernels as ak

MEASUREMENTS: dict[str, Callable[[Setting], Iterator[Result]]] = {
    "driver_calls": measure_driver_calls,
    "pinning": measure_pinning,
    "transfers": measure_transfers,
    "restore": measure_restore,
    "decode": measure_decode,
    "kv": measure_kv,
}


def main() -> int:
    arguments = parse_arguments()
    name = arguments.device or ("host" if arguments.dry_run else "cuda:0")
    library = {"library": arguments.library} if arguments.library else {}
    device = ak.Device(name, **library)
    setting = Setting.tiny(device) if arguments.dry_run else Setting.full(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    measured_on = environment() | gpu() | {"device": device.name, "dry_run": arguments.dry_run}
    num_errors = 0
    with (arguments.out / "gpu.jsonl").open("a") as file:
        for measurement in arguments.only or MEASUREMENTS:
            bystanders = Bystanders()
            for result in results_of(measurement, setting):
                num_errors += "error" in result
                show(result)
                line = {
                    **result,
                    "measurement": measurement,
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "others_busy_cores": round(bystanders.busy_cores(), 2),
                    **measured_on,
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
    return 1 if num_errors else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="default: cuda:0, or host in a dry run")
    parser.add_argument("--library", help="the CUDA driver library; default: libcuda.so.1")
    parser.add_argument("--out", type=Path, help="folder of gpu.jsonl; default: bench/results")
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any device")
    arguments = parser.parse_args()
    if arguments.out is None:
        if arguments.dry_run:
            parser.error("--dry-run needs --out: its figures are no results")
        arguments.out = Path(__file__).parents[1] / "results"
    return arguments


def results_of(measurement: str, setting: Setting) -> Iterator[Result]:
    """What cannot be measured, or goes wrong, costs the rest of this measurement only."""
    try:
        yield from MEASUREMENTS[measurement](setting)
    except Skipped as skipped:
        yield {"result": measurement, "skipped": str(skipped)}
    except Exception as error:
        traceback.print_exc()
        yield {"result": measurement, "error": f"{type(error).__name__}: {error}"}


def show(result: Result) -> None:
    print(result["result"])
    for key, value in result.items():
        if key != "result":
            print(
                f"  {key:<32} {value:.4g}" if isinstance(value, float) else f"  {key:<32} {value}"
            )
    sys.stdout.flush()


def gpu() -> dict[str, Any]:
    """As nvidia-smi has it: name, driver, and the link at its best and now."""
    fields = ("name", "driver_version", "memory.total")
    fields += tuple(
        f"pcie.link.{what}.{when}" for what in ("gen", "width") for when in ("max", "current")
    )
    keys = [f"gpu_{field.replace('.', '_')}" for field in fields]
    program = shutil.which("nvidia-smi")
    if program is None:
        return dict.fromkeys(keys)
    done = subprocess.run(
        [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(keys, values, strict=True)) if len(values) == len(keys) else dict.fromkeys(keys)


if __name__ == "__main__":
    sys.exit(main())
