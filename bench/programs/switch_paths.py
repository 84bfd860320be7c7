"""One model is wanted while another runs: by every path that leads to its first token.

Reads a job from standard input: `models` (name -> checkpoint, two), `device_memory` for both,
`kv_memory`, `max_model_len`, `prompt`, `rounds`, `load_rounds`, `image_cache` (an empty directory),
`device` (default: host). The last line of standard output is the answer: by path, per round,
seconds until the token was there, of which in the switch; and whether it was always the same token.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aegaeon_kernels as ak
from aegaeon.core import envs
from aegaeon.core.config import ModelConfig
from aegaeon.sched.policies.round_robin import RoundRobin
from aegaeon.switching.image_cache import ImageCache
from aegaeon.switching.residency import WeightsUnit

envs.set_vllm_defaults()

from aegaeon.vllm_plugin.offline import OfflinePool, Prompt  # noqa: E402 - imports vLLM

SAMPLING = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}


class Paths:
    """The measurements; each leaves the first model running."""

    def __init__(self, pool: OfflinePool, job: dict[str, Any], cache: ImageCache) -> None:
        self._pool, self._job, self._cache = pool, job, cache
        self._running, self._wanted = job["models"]
        self.seconds: dict[str, list[tuple[float, float]]] = {}
        self.tokens: set[int] = set()
        self._added = 0

    def token(self, name: str) -> int:
        [output] = self._pool.generate([Prompt(name, self._job["prompt"], SAMPLING)])
        token: int = output.outputs[0].token_ids[0]
        return token

    def measure(self, path: str, prepare: Callable[[], None], name: str) -> None:
        """From the moment the model is wanted; `prepare` happened before."""
        self.token(self._running)
        prepare()
        started = time.perf_counter()
        token = self.token(name)
        seconds = time.perf_counter() - started
        self.seconds.setdefault(path, []).append((seconds, self._pool.switcher.records[-1].seconds))
        self.tokens.add(token)

    def hot(self) -> None:
        self.measure("hot", lambda: self._pool.switcher.activate(self._running), self._wanted)

    def warm(self, percent: int) -> None:
        self.measure(f"warm, {percent} % ahead", lambda: self._ahead(percent), self._wanted)

    def _ahead(self, percent: int) -> None:
        switcher = self._pool.switcher
        switcher.evict(self._wanted)
        unit = switcher.models[self._wanted].units[0]
        assert isinstance(unit, WeightsUnit)
        assert percent == 0 or switcher.prefetch(self._wanted)
        while unit.bytes_ahead < unit.image.size_bytes * percent / 100:
            time.sleep(0)

    def load(self, path: str, cache: ImageCache | None) -> None:
        """A model that is not there yet, from a saved image or from its checkpoint."""
        self.token(self._running)
        self._added += 1
        name = f"{self._wanted}-{self._added}"
        self._pool.switcher.evict(self._wanted)
        self._pool._image_cache = cache
        image = self._image_for(name) if cache else None
        before = image.stat().st_ino if image else None
        started = time.perf_counter()
        self.add(name, self._job["models"][self._wanted])
        ready = time.perf_counter() - started
        self.tokens.add(self.token(name))
        self.seconds.setdefault(path, []).append((time.perf_counter() - started, ready))
        if image:  # it was read, not written anew
            assert image.stat().st_ino == before
        self._pool.switcher.evict(name)

    def _image_for(self, name: str) -> Path:
        """The saved image of the wanted model, under another name: the cache files it by name."""
        folder = Path(self._job["image_cache"])
        source = min(folder.glob(f"{self._wanted}-*"), key=lambda path: len(path.name))
        target = folder / source.name.replace(self._wanted, name, 1)
        target.write_bytes(source.read_bytes())
        return target

    def add(self, name: str, path: str) -> None:
        self._pool.add_model(
            ModelConfig(
                model=path,
                name=name,
                kv_memory=self._job["kv_memory"],
                max_model_len=self._job["max_model_len"],
                vllm={"enable_prefix_caching": False},
            )
        )


def main() -> None:
    job = json.load(sys.stdin)
    name = job.get("device", "host")
    device = ak.Device(name, **({"memory_bytes": job["device_memory"]} if name == "host" else {}))
    cache = ImageCache(Path(job["image_cache"]), 1 << 40)
    with OfflinePool(
        device,
        device_memory_bytes=job["device_memory"],
        policy=RoundRobin(quantum=1),
        image_cache=cache,
    ) as pool:
        paths = Paths(pool, job, cache)
        for name, path in job["models"].items():
            paths.add(name, path)
            paths.token(name)
        for _ in range(job["rounds"]):
            paths.hot()
            for percent in (0, 50, 100):
                paths.warm(percent)
        for _ in range(job["load_rounds"]):
            paths.load("cold, saved image", cache)
            paths.load("first load, safetensors", None)
    answer = {"exact": len(paths.tokens) == 1, "seconds": paths.seconds}
    sys.stdout.flush()
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
