"""How long does a switch take, compared with copying its bytes, and with restarting vLLM?

    pytest bench/bench_switch.py          (with --keep-results the figures go to results/)

Limit: a switch that copies cannot be faster than memory is. The baseline is `memmove` of exactly
the bytes that the switch moves, in one thread, from the same host images, into memory that is
mapped and faulted in, in turns with the switches, so that both meet the same load and the same
caches. Every destination is larger than the last-level cache. Goals: at most 1.3x of that from
64 MiB on; less than 1 ms when the model is resident.
"""

import ctypes
import json
import mmap
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from load import prompts, run_load
from measure import paired_ratio, quantiles
from servers import KV_MEMORY, MAX_MODEL_LEN, Server, aegaeon_server, room_for_one, vllm_server

import aegaeon_kernels as ak
from aegaeon.core.clock import MonotonicClock
from aegaeon.switching.kv_store import HostKVStore
from aegaeon.switching.residency import DroppedKV, KVUnit
from aegaeon.switching.switcher import Switcher, SwitchRecord
from aegaeon.tiny_model import write_tiny_model
from aegaeon_kernels.kv_layout import KVLayout, Plane

# On a busy machine the slowest parts, which start vLLM, take minutes.
pytestmark = pytest.mark.timeout(900)

MIB = 1 << 20
PHASES = ("save_s", "unmap_s", "map_s", "load_s")
# Of a KV cache: pages of one block in so many layers, as vLLM lays them out.
LAYERS = 16
PAGE_BYTES = 32 << 10


@dataclass
class HostedPair:
    """Two models of `weight_bytes` and a KV cache of an eighth of that, half of it live."""

    switcher: Switcher
    weights: dict[str, ak.HostImage]
    kv: dict[str, KVUnit]
    live_bytes: int
    seconds: list[float] = field(default_factory=list)
    minor_faults: list[int] = field(default_factory=list)

    def switch(self) -> None:
        """Activate the model that is not current; the time and the page faults are kept."""
        name = self.other()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        started = time.perf_counter()
        self.switcher.activate(name)
        self.seconds.append(time.perf_counter() - started)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        self.minor_faults.append(faults)

    def other(self) -> str:
        return next(name for name in self.weights if name != self.switcher.current)

    def records(self) -> Sequence[SwitchRecord]:
        return list(self.switcher.records)[-len(self.seconds) :]

    def forget(self) -> None:
        self.seconds.clear()
        self.minor_faults.clear()


@contextmanager
def hosted_pair(
    weight_bytes: int,
    *,
    together: bool = False,
    handle_bytes: int | None = None,
    chunk_bytes: int | None = None,
    depth: int | None = None,
) -> Iterator[HostedPair]:
    """Device memory for one of the two, or (`together`) for both."""
    kv_bytes = max(weight_bytes // 8, 2 * MIB)
    capacity = (weight_bytes + kv_bytes) * (2 if together else 1)
    device = ak.Device("host", memory_bytes=capacity)
    knobs = {"chunk_bytes": chunk_bytes, "depth": depth}
    switcher = Switcher(
        arena=ak.Arena(device, capacity_bytes=capacity, handle_bytes=handle_bytes),
        prefetcher=ak.Prefetcher(device, **{k: v for k, v in knobs.items() if v is not None}),
        kv_store=HostKVStore(ak.HostImage.allocate(2 * kv_bytes + 4 * MIB, device=device)),
        clock=MonotonicClock(),
    )
    num_blocks = kv_bytes // (LAYERS * PAGE_BYTES)
    layout = KVLayout(
        planes=tuple(Plane(i * num_blocks * PAGE_BYTES, PAGE_BYTES) for i in range(LAYERS)),
        block_bytes=PAGE_BYTES,
        num_blocks=num_blocks,
        size_bytes=kv_bytes,
    )
    random = np.random.default_rng(0)
    live = sorted(random.choice(num_blocks, num_blocks // 2, replace=False).tolist())
    weights, kv = {}, {}
    try:
        for name in ("a", "b"):
            image = ak.HostImage.allocate(weight_bytes, device=device, name=name)
            bytes_of(image)[:] = random.integers(0, 256, weight_bytes, dtype=np.uint8)
            image.seal()
            weights[name] = image
            switcher.add_model(name)
            switcher.add_weights(name, image)
            kv[name] = switcher.add_kv(name, kv_bytes)
            kv[name].layouts = (layout,)
            switcher.activate(name)
            kv[name].book = LiveBlocks(live, kv[name])
            np.from_dlpack(kv[name].region)[:] = random.integers(0, 256, kv_bytes, dtype=np.uint8)
        yield HostedPair(switcher, weights, kv, len(live) * layout.bytes_per_block)
    finally:
        switcher.close()


@dataclass
class LiveBlocks:
    """The book of an engine that has written to all its live blocks whenever it is asked."""

    block_ids: Sequence[int]
    unit: KVUnit

    def live(self) -> Sequence[int]:
        self.unit.written(self.block_ids)
        return self.block_ids

    def drop(self) -> DroppedKV:
        raise AssertionError("the store has room for both")


def bytes_of(image: ak.HostImage) -> np.ndarray:
    return np.asarray(memoryview(image))


def check_exact(pair: HostedPair) -> None:
    """After two switches each, both models have every byte of their weights and live blocks."""
    before = {}
    for name in pair.weights:
        pair.switcher.activate(name)
        before[name] = live_bytes(pair.kv[name]).copy()
    for name in (*pair.weights, *pair.weights):
        pair.switcher.activate(name)
        unit = pair.switcher.models[name].units[0]
        assert np.array_equal(np.from_dlpack(unit.region), bytes_of(pair.weights[name]))
        assert np.array_equal(live_bytes(pair.kv[name]), before[name])


def live_bytes(unit: KVUnit) -> np.ndarray:
    cache = np.from_dlpack(unit.region)
    ranges = unit.layouts[0].ranges(unit.book.live())
    return np.concatenate([cache[start : start + size] for start, size in ranges])


@dataclass
class Memmove:
    """Copies what a switch of `pair` copies, into and out of memory of its own."""

    pair: HostedPair

    def __post_init__(self) -> None:
        num_bytes = len(next(iter(self.pair.weights.values()))) + 2 * self.pair.live_bytes
        self._memory = mmap.mmap(-1, num_bytes)
        self._memory.madvise(mmap.MADV_HUGEPAGE)  # the baseline at its best
        self._array = np.frombuffer(self._memory, dtype=np.uint8)
        self._array[:] = 1  # faulted in
        self._kv_out = np.ones(self.pair.live_bytes, dtype=np.uint8)
        self.seconds: list[float] = []

    def run(self, name: str) -> None:
        """KV of the model that leaves out; weights and KV of `name` in."""
        image, kv = self.pair.weights[name], self.pair.switcher.kv_store.image
        live = self.pair.live_bytes
        device = self._array.ctypes.data
        started = time.perf_counter()
        ctypes.memmove(self._kv_out.ctypes.data, device + len(image) + live, live)
        ctypes.memmove(device, image.address, len(image))
        ctypes.memmove(device + len(image), kv.address, live)
        self.seconds.append(time.perf_counter() - started)


def measure_pair(pair: HostedPair, benchmark: Any, rounds: int) -> dict[str, Any]:
    """Switches and copies in turns; the figures of a result."""
    pair.forget()
    memmove = Memmove(pair)
    # Each takes the image that the other took a round ago.
    benchmark.pedantic(
        pair.switch,
        setup=lambda: memmove.run(pair.switcher.current),
        rounds=rounds,
        warmup_rounds=0,
    )
    records = pair.records()
    num_bytes = records[-1].bytes_in + records[-1].bytes_out
    assert all(record.path == "warm" for record in records)
    assert num_bytes == len(pair.weights["a"]) + 2 * pair.live_bytes
    figures: dict[str, Any] = {"mib_moved": num_bytes / MIB, "rounds": len(records)}
    figures |= quantiles("switch_ms", pair.seconds) | quantiles("memmove_ms", memmove.seconds)
    figures["gb_per_s"] = num_bytes / statistics.median(pair.seconds) / 1e9
    figures["memmove_gb_per_s"] = num_bytes / statistics.median(memmove.seconds) / 1e9
    figures["ratio"] = paired_ratio(pair.seconds, memmove.seconds)
    for phase in PHASES:
        spent = [getattr(record, phase) for record in records]
        figures[f"{phase.removesuffix('_s')}_ms"] = statistics.median(spent) * 1e3
    figures["faults_per_switch"] = statistics.median(pair.minor_faults)
    return figures


@pytest.mark.parametrize("size_mib", [64, 256, 512])
def test_warm_switch(size_mib, benchmark, record):
    """The other model is not resident: its KV cache goes out, weights and KV cache come in."""
    with hosted_pair(size_mib * MIB) as pair:
        check_exact(pair)
        figures = measure_pair(pair, benchmark, rounds=max(16, 6144 // size_mib))
        check_exact(pair)
    record(f"warm switch, {size_mib} MiB", benchmark, **figures)


@pytest.mark.parametrize(
    ("handle_mib", "chunk_mib", "depth"),
    [(2, 8, 2), (32, 8, 2), (32, 1, 2), (32, 32, 2), (32, 256, 1), (2, 256, 1)],
)
def test_warm_switch_by_handle_and_chunk_size(handle_mib, chunk_mib, depth, benchmark, record):
    """What the sizes cost: fewer handles are fewer system calls, fewer chunks fewer hand-overs."""
    sizes = {"handle_bytes": handle_mib * MIB, "chunk_bytes": chunk_mib * MIB, "depth": depth}
    with hosted_pair(256 * MIB, **sizes) as pair:
        check_exact(pair)
        figures = measure_pair(pair, benchmark, rounds=16)
    name = f"warm switch, 256 MiB, handles {handle_mib} MiB, chunks {depth} x {chunk_mib} MiB"
    record(name, benchmark, **figures)


@pytest.mark.parametrize("handle_mib", [2, 8, 32])
def test_unequal_models_that_fill_the_device(handle_mib, benchmark, record):
    """62 and 64 MiB on a device of 64: their large handles and tails cannot serve each other."""
    sizes = {"a": 62 * MIB, "b": 64 * MIB}
    capacity = max(sizes.values())
    device = ak.Device("host", memory_bytes=capacity)
    switcher = Switcher(
        arena=ak.Arena(device, capacity_bytes=capacity, handle_bytes=handle_mib * MIB),
        prefetcher=ak.Prefetcher(device),
        kv_store=HostKVStore(ak.HostImage.allocate(2 * MIB, device=device)),
        clock=MonotonicClock(),
    )
    pair = HostedPair(switcher, {}, {}, 0)
    try:
        for name, size in sizes.items():
            image = ak.HostImage.allocate(size, device=device, name=name)
            bytes_of(image)[:] = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
            image.seal()
            pair.weights[name] = image
            switcher.add_model(name)
            switcher.add_weights(name, image)
        for name in (*sizes, *sizes):
            switcher.activate(name)
            region = switcher.models[name].units[0].region
            assert np.array_equal(np.from_dlpack(region), bytes_of(pair.weights[name]))
        before = switcher.arena.stats().total_converted
        benchmark.pedantic(pair.switch, rounds=60)
        converted = switcher.arena.stats().total_converted - before
    finally:
        switcher.close()
    figures = quantiles("switch_ms", pair.seconds)
    figures["gb_per_s"] = 63 * MIB / statistics.median(pair.seconds) / 1e9
    figures["faults_per_switch"] = statistics.median(pair.minor_faults)
    figures["handles_converted_per_switch"] = converted / len(pair.seconds)
    record(f"62 and 64 MiB on 64 MiB, handles {handle_mib} MiB", benchmark, **figures)


def test_hot_switch(benchmark, record):
    """Both models are resident: nothing moves."""
    with hosted_pair(64 * MIB, together=True) as pair:
        check_exact(pair)
        pair.forget()
        benchmark.pedantic(pair.switch, rounds=2000, warmup_rounds=100)
        assert {record.path for record in pair.records()} == {"hot"}
        record("hot switch", benchmark, **quantiles("switch_us", pair.seconds, scale=1e6))


# -- real models ---------------------------------------------------------------------------------

PROGRAM = Path(__file__).parent / "programs" / "hosted_switches.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two architectures of 85 MiB of weights."""
    folder = tmp_path_factory.mktemp("models")
    return {
        arch: write_tiny_model(arch, folder / arch, size="small", seed=seed)
        for seed, arch in enumerate(("llama", "qwen3"))
    }


@pytest.mark.parametrize("room", ["one", "both"])
def test_switch_of_real_models(room, models, benchmark, record):
    """vLLM's engines with open requests, a switch after every token; memmove after each switch."""
    job = {
        "models": {name: str(path) for name, path in models.items()},
        "device_memory": room_for_one(models) * (1 if room == "one" else 2),
        "kv_memory": KV_MEMORY,
        "max_model_len": MAX_MODEL_LEN,
        "prompts": prompts(4),
        "max_tokens": 32,
    }
    done = benchmark.pedantic(
        lambda: subprocess.run(
            [sys.executable, str(PROGRAM)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
        ),
        rounds=1,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["exact"]
    path = {"one": "warm", "both": "hot"}[room]
    switches = [switch for switch in answer["switches"] if switch["path"] == path]
    assert len(switches) > 0.9 * len(answer["switches"])
    seconds = [switch["seconds"] for switch in switches]
    figures: dict[str, Any] = {"switches": len(switches)}
    if path == "hot":
        figures |= quantiles("switch_us", seconds, scale=1e6)
    else:
        figures |= quantiles("switch_ms", seconds) | quantiles("memmove_ms", answer["memmove_s"])
        figures["ratio"] = paired_ratio(seconds, answer["memmove_s"])
        for direction in ("bytes_in", "bytes_out"):
            moved = statistics.median(switch[direction] for switch in switches)
            figures[f"mib_{direction.removeprefix('bytes_')}"] = moved / MIB
        for phase in PHASES:
            spent = statistics.median(switch[phase] for switch in switches)
            figures[f"{phase.removesuffix('_s')}_ms"] = spent * 1e3
        rest = [switch["seconds"] - sum(switch[phase] for phase in PHASES) for switch in switches]
        figures["plan_and_rest_ms"] = statistics.median(rest) * 1e3
    record(f"real models, {path} switch after every token", benchmark, **figures)


def test_against_restarting_vllm(models, tmp_path, record):
    """What users do today: end the server of one model, start the next, ask for a token."""
    text = prompts(1)[0]

    def first_token(server: Server, name: str) -> tuple[float, list[int]]:
        load = run_load(server.address, name, [text], concurrency=1, max_tokens=1)
        return load.answers[0].ttft_s, load.answers[0].token_ids

    ours: list[float] = []
    tokens: dict[str, set[int]] = {name: set() for name in models}
    with aegaeon_server(models, tmp_path) as server:
        for name in (*models,) * 11:  # every request needs the model that is not resident
            seconds, token_ids = first_token(server, name)
            ours.append(seconds)
            tokens[name] |= set(token_ids)
    assert all(len(seen) == 1 for seen in tokens.values()), "a switch changed a token"
    ours = ours[len(models) :]

    restart: list[float] = []
    stop: list[float] = []
    ended = None
    for name in (*models, next(iter(models))):
        with vllm_server(name, models[name], tmp_path / "vllm", plain_weights=False) as server:
            first_token(server, name)
            if ended is not None:
                restart.append(time.monotonic() - ended)
            ended = time.monotonic()
        stop.append(server.stop_s)
    figures = quantiles("switch_to_first_token_ms", ours)
    figures["vllm_restart_to_first_token_s"] = statistics.median(restart)
    figures["of_which_stopping_s"] = statistics.median(stop)
    figures["times_faster"] = statistics.median(restart) / statistics.median(ours)
    record("first token of the other model, against restarting vLLM", None, **figures)
