"""How large everything is, on a GPU and in a dry run; and the checkpoints."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aegaeon import checkpoint
from aegaeon.core import envs
from aegaeon.tiny_model import write_tiny_model

# One line of the results: "result" is its name, the rest figures with their unit in the name.
Result = dict[str, Any]

MIB, GIB = 1 << 20, 1 << 30
PROGRAMS = Path(__file__).parents[2] / "programs"


class Skipped(Exception):
    """Cannot be measured here, and why. The runner writes it into the results and goes on."""


@dataclass(frozen=True)
class Scale:
    """architectures: name -> (architecture, size) of `aegaeon tiny-model`."""

    device: str
    folder: Path
    architectures: Mapping[str, tuple[str, str]]
    kv_memory: int
    max_model_len: int
    switches: int
    rounds: int
    load_rounds: int
    # Of the Poisson load: requests per second and model, and for how long.
    rates: tuple[float, ...]
    load_s: float
    max_tokens: int
    ttft_ms: float
    tpot_ms: float

    @classmethod
    def full(cls, device: str, folder: Path) -> "Scale":
        return cls(
            device=device,
            folder=folder,
            architectures={
                "llama-8b": ("llama", "8b"),
                "qwen3-8b": ("qwen3", "8b"),
                "llama-1b": ("llama", "1b"),
                "qwen3-1b": ("qwen3", "1b"),
            },
            kv_memory=8 * GIB,
            max_model_len=8192,
            switches=2000,
            rounds=50,
            load_rounds=3,
            rates=(0.1, 0.2, 0.4, 0.8),
            load_s=120.0,
            max_tokens=200,
            ttft_ms=5000.0,
            tpot_ms=100.0,
        )

    @classmethod
    def tiny(cls, device: str, folder: Path) -> "Scale":
        """For --dry-run: every line of code, no meaningful figure."""
        names = ("llama", "qwen3", "gemma", "qwen2")
        return cls(
            device=device,
            folder=folder,
            architectures={name: (name, "tiny") for name in names},
            kv_memory=8 * MIB,
            max_model_len=512,
            switches=40,
            rounds=2,
            load_rounds=1,
            rates=(0.5,),
            load_s=4.0,
            max_tokens=8,
            ttft_ms=5000.0,
            tpot_ms=500.0,
        )

    @property
    def is_gpu(self) -> bool:
        return self.device != "host"

    @property
    def models(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.architectures}

    def write_models(self) -> None:
        """Those that are not there yet."""
        for seed, (name, (arch, size)) in enumerate(self.architectures.items()):
            if not (self.folder / name / "config.json").exists():
                write_tiny_model(arch, self.folder / name, size=size, seed=seed)

    def room_for(self, *names: str) -> int:
        """Device memory for all of these at once."""
        page = 2 * MIB
        weights = [checkpoint.weight_bytes(name, self.models[name]) for name in names]
        return sum(-(-each // page) * page + page + self.kv_memory for each in weights)

    @property
    def room_for_largest(self) -> int:
        return max(self.room_for(name) for name in self.architectures)

    @property
    def engine(self) -> dict[str, Any]:
        """vLLM's options, the same for everybody who is compared."""
        return {"enable_prefix_caching": False, "enforce_eager": not self.is_gpu}


def run_program(name: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of bench/programs/<name>.py to `job`. Raises RuntimeError with its last words."""
    envs.set_vllm_defaults()
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / f"{name}.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
