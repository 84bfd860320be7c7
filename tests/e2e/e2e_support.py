"""What the end-to-end tests share: requests, jobs for the example programs, and how to run them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from aegaeon import checkpoint

PROGRAMS = Path(__file__).parent / "programs"
MAX_MODEL_LEN = 512
KV_MEMORY = 16 << 20
PROGRAM_TIMEOUT_S = 280

Requests = dict[str, list[dict[str, Any]]]


def requests_for(names: list[str], *, per_model: int = 5, max_tokens: int = 24) -> Requests:
    """Greedy and seeded sampling in turn; a shared beginning longer than a KV block of 128."""
    beginning = "In the old harbour, between the fish market and the customs house, " * 6
    return {
        name: [
            {
                "prompt": f"{beginning if i % 2 else ''}{name} {i}: " + "tell me more. " * (i + 1),
                "sampling": {
                    "max_tokens": max_tokens + i,
                    "temperature": 0.0 if i % 2 == 0 else 0.9,
                    "seed": 100 + i,
                    "ignore_eos": True,
                },
            }
            for i in range(per_model)
        ]
        for name in names
    }


def job_for(models: dict[str, str], requests: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Device memory for the largest model and its KV cache, and for nothing beside it."""
    largest = max(checkpoint.weight_bytes(name, Path(path)) for name, path in models.items())
    return {
        "models": models,
        "requests": requests,
        "device_memory": -(-(largest + (2 << 20)) // (2 << 20)) * (2 << 20) + KV_MEMORY,
        "kv_memory": KV_MEMORY,
        "max_model_len": MAX_MODEL_LEN,
        "quantum": 1,
        **options,
    }


def run_program(name: str, job: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run tests/e2e/programs/<name>.py with `job` on its standard input, to its end."""
    return subprocess.run(
        [sys.executable, str(PROGRAMS / f"{name}.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=PROGRAM_TIMEOUT_S,
        check=False,
    )
