"""What do transfers in the background do to a model that is decoding?

Limit: nothing but the share of memory bandwidth that the link can take, which is a few per cent of
a GPU's own. The proxy: a captured graph of matrix products with the weights' traffic of a decode
step, before it a copy of 1 KiB from pinned memory (the tokens), as an engine has. Goal: the 99th
percentile of a step grows by at most 3 % while the prefetcher runs.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Protocol

import numpy as np
from measure import quantiles
from setting import Model, PlainStream, Result, Setting, Skipped, model

import aegaeon_kernels as ak

TOKENS_BYTES = 1024


class Decoder(Protocol):
    name: str

    def step(self) -> None:
        """One step, to its end."""


class GraphDecoder:
    """On a GPU, by torch: 32 layers of 4096 x 4096 products for 16 tokens, in one graph."""

    name = "graph of matrix products"

    def __init__(self, device: ak.Device) -> None:
        try:
            import torch
        except ImportError as error:
            raise Skipped(f"torch is not importable: {error}") from error
        if device.kind != "cuda" or not torch.cuda.is_available():
            raise Skipped("torch has no CUDA device here")
        torch.cuda.set_device(device.name)
        with torch.no_grad():
            weights = [
                torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda") / 64 for _ in range(32)
            ]
            hidden = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")

            def forward() -> torch.Tensor:
                out = hidden
                for weight in weights:
                    out = out @ weight
                return out

            self._stream = torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                forward()  # before the capture: what cuBLAS allocates on its first call
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._out = forward()
        self._torch = torch
        self._keep = (weights, hidden)
        self._tokens = torch.zeros(TOKENS_BYTES, dtype=torch.uint8, pin_memory=True)
        self._on_device = torch.zeros(TOKENS_BYTES, dtype=torch.uint8, device="cuda")

    def step(self) -> None:
        with self._torch.cuda.stream(self._stream):
            self._on_device.copy_(self._tokens, non_blocking=True)
            self._graph.replay()
        self._stream.synchronize()


class HostDecoder:
    """On any device, for trying the rest of this file: the products run on the host."""

    name = "matrix products on the host"

    def __init__(self, device: ak.Device) -> None:
        self._arena = ak.Arena(device, capacity_bytes=device.granularity_bytes)
        self._region = self._arena.reserve(device.granularity_bytes, owner="decoder")
        self._region.map()
        self._tokens = ak.HostImage.allocate(TOKENS_BYTES, device=device)
        self._stream = PlainStream(device)
        self._weight = np.eye(64, dtype=np.float32)

    def step(self) -> None:
        self._stream.load(self._region.address, self._tokens.address, TOKENS_BYTES)
        out = self._weight
        for _ in range(4):
            out = out @ self._weight
        self._stream.wait()

    def close(self) -> None:
        self._stream.close()
        self._arena.close()


def measure_decode(setting: Setting) -> Iterator[Result]:
    if setting.is_tiny:
        host_decoder = HostDecoder(setting.device)
        yield from _beside_transfers(setting, host_decoder)
        host_decoder.close()
    yield from _beside_transfers(setting, GraphDecoder(setting.device))


def _beside_transfers(setting: Setting, decoder: Decoder) -> Iterator[Result]:
    """Blocks of steps, alone and beside each kind of transfer in turns."""
    with model(setting) as ours:
        ours.map()
        ours.load()
        link = ours.prefetcher.stats().load.gb_per_s * 1e9
        stored = ak.HostImage.allocate(setting.model_bytes // 4, device=setting.device)
        part = [(0, len(stored))]
        load = lambda: ours.prefetcher.load(ours.image, ours.region)  # noqa: E731
        store = lambda: ours.prefetcher.store(ours.region, stored, order=part)  # noqa: E731
        half = {"load": link / 2, "store": link / 2}
        modes = {
            "alone": ([], {}),
            "loading": ([load], {}),
            "loading at half the rate": ([load], half),
            "storing": ([store], {}),
            "loading and storing": ([load, store], {}),
        }
        steps: dict[str, list[float]] = {name: [] for name in modes}
        moved: dict[str, list[float]] = {name: [] for name in modes}
        timed_steps(decoder, 10)  # the first ones are slow
        for _ in range(setting.rounds):
            for name, (transfers, rates) in modes.items():
                ours.prefetcher.set_rate(load=rates.get("load"), store=rates.get("store"))
                with _running(transfers):
                    before, started = _bytes_moved(ours), time.perf_counter()
                    steps[name] += timed_steps(decoder, setting.decode_steps)
                    took = time.perf_counter() - started
                    moved[name].append((_bytes_moved(ours) - before) / took / 1e9)
        ours.prefetcher.set_rate(load=None, store=None)
        ours.load()
        ours.check()
    alone = p99(steps["alone"])
    for name, seconds in steps.items():
        yield {
            "result": f"decoding ({decoder.name}), {name}",
            "steps": len(seconds),
            **quantiles("step_us", seconds, scale=1e6),
            "step_us_p99": p99(seconds) * 1e6,
            "p99_of_alone": p99(seconds) / alone,
            "moved_gb_per_s": median(moved[name]),
        }


def _bytes_moved(ours: Model) -> int:
    stats = ours.prefetcher.stats()
    return stats.load.bytes + stats.store.bytes


def timed_steps(decoder: Decoder, num_steps: int) -> list[float]:
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        decoder.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, len(seconds) * 99 // 100)]


OVER = {ak.TicketState.DONE, ak.TicketState.CANCELLED, ak.TicketState.FAILED}


@contextmanager
def _running(transfers: list[Callable[[], ak.Ticket]]) -> Iterator[None]:
    """Inside the block each of them runs over and over."""
    stop = threading.Event()
    errors: list[Exception] = []

    def repeat(transfer: Callable[[], ak.Ticket]) -> None:
        try:
            while not stop.is_set():
                ticket = transfer()
                while ticket.state not in OVER and not stop.wait(0.001):
                    pass
                if ticket.state not in OVER:
                    ticket.cancel()
                try:
                    ticket.wait()
                except ak.TransferCancelled:
                    return
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=[transfer]) for transfer in transfers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
