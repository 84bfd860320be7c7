"""Checks and measures a whole pool on a GPU machine with vLLM; writes a JSON line for each result.

    python bench/gpu/e2e/run.py                      four models of 1 to 8 billion weights, cuda:0
    python bench/gpu/e2e/run.py --only exactness     one part: exactness, paths or goodput
    python bench/gpu/e2e/run.py --dry-run --out DIR  tiny models on the host device, without a GPU

Checkpoints with random weights are made on the machine first, below --models (about 40 GB, kept for
the next run). Parts: `exactness`, every token of 2,000 switches against the models alone, with
CUDA graphs; `paths`, how long until the first token by where a model is; `goodput`, requests that
meet their deadlines under Poisson load, with each of our policies and with vLLM's sleep mode behind
a router that swaps whole models. What goes wrong is a line too, under `error`; then the exit status
is 1. Needs the extras `vllm`, `bench` and `dev`, about 70 GiB of device memory and 60 GiB of host
memory; takes about an hour. NOT YET RUN ON A GPU.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # measure.py, load.py, servers.py serve the other benches

from exactness import measure_exactness  # noqa: E402
from goodput import measure_goodput  # noqa: E402
from measure import Bystanders, environment  # noqa: E402
from paths import measure_paths  # noqa: E402
from scale import Result, Scale, Skipped  # noqa: E402

PARTS: dict[str, Callable[[Scale], Iterator[Result]]] = {
    "exactness": measure_exactness,
    "paths": measure_paths,
    "goodput": measure_goodput,
}


def main() -> int:
    arguments = parse_arguments()
    arguments.models.mkdir(parents=True, exist_ok=True)
    make = Scale.tiny if arguments.dry_run else Scale.full
    scale = make(arguments.device, arguments.models)
    scale.write_models()
    arguments.out.mkdir(parents=True, exist_ok=True)
    measured_on = environment() | {"device": scale.device, "dry_run": arguments.dry_run}
    num_errors = 0
    with (arguments.out / "gpu_e2e.jsonl").open("a") as file:
        for part in arguments.only or PARTS:
            bystanders = Bystanders()
            for result in results_of(part, scale):
                num_errors += "error" in result
                print(json.dumps(result), flush=True)
                line = {
                    **result,
                    "part": part,
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
    parser.add_argument("--device", default=None, help="default: cuda:0, or host in a dry run")
    parser.add_argument("--models", type=Path, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, help="folder of gpu_e2e.jsonl; default: bench/results")
    parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, no GPU")
    arguments = parser.parse_args()
    if arguments.dry_run and arguments.out is None:
        parser.error("--dry-run needs --out: its figures are no results")
    arguments.device = arguments.device or ("host" if arguments.dry_run else "cuda:0")
    arguments.out = arguments.out or HERE.parents[1] / "results"
    arguments.models = arguments.models or arguments.out / "models"
    return arguments


def results_of(part: str, scale: Scale) -> Iterator[Result]:
    """What cannot be measured, or goes wrong, costs the rest of this part only."""
    try:
        yield from PARTS[part](scale)
    except Skipped as skipped:
        yield {"result": part, "skipped": str(skipped)}
    except Exception as error:
        traceback.print_exc()
        yield {"result": part, "error": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    sys.exit(main())
