"""What a GPU measurement is given, and what they share. Knows sizes, not questions."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import aegaeon_kernels as ak

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# One line of the results: "result" is its name, the rest figures with their unit in the name.
Result = dict[str, Any]


class Skipped(Exception):
    """Cannot be measured here, and why. The runner writes it into the results and goes on."""


@dataclass(frozen=True)
class Setting:
    """Where to measure, and how much."""

    device: ak.Device
    model_bytes: int  # weights of one model
    table_bytes: int  # of handles for the table of driver calls
    pinned_bytes: int  # for each kind of host memory
    kv_bytes: int  # of a KV cache, half of which is copied on the device
    swap_bytes: int  # of KV that goes over the link
    pool_bytes: int  # of a KV cache that is compacted
    chunk_bytes: int
    rounds: int
    decode_steps: int  # in each round
    is_tiny: bool  # a dry run

    @classmethod
    def full(cls, device: ak.Device) -> "Setting":
        return cls(
            device=device,
            model_bytes=15 * GIB,
            table_bytes=2 * GIB,
            pinned_bytes=8 * GIB,
            kv_bytes=8 * GIB,
            swap_bytes=GIB,
            pool_bytes=40_000_000_000,
            chunk_bytes=8 * MIB,
            rounds=10,
            decode_steps=1000,
            is_tiny=False,
        )

    @classmethod
    def tiny(cls, device: ak.Device) -> "Setting":
        """For --dry-run: every line of code, no meaningful figure."""
        return cls(
            device=device,
            model_bytes=16 * MIB,
            table_bytes=128 * MIB,
            pinned_bytes=4 * MIB,
            kv_bytes=2 * MIB,
            swap_bytes=4 * MIB,
            pool_bytes=8 * MIB,
            chunk_bytes=256 * KIB,
            rounds=2,
            decode_steps=20,
            is_tiny=True,
        )

    def require_device_memory(self, size_bytes: int) -> None:
        free, _ = self.device.memory_info()
        if free < size_bytes:
            raise Skipped(
                f"needs {size_bytes / GIB:.1f} GiB of device memory, {free / GIB:.1f} free"
            )


@dataclass
class Model:
    """Weights in pinned host memory, and a region for them that is not mapped yet."""

    setting: Setting
    arena: ak.Arena
    image: ak.HostImage
    region: ak.Region
    prefetcher: ak.Prefetcher

    def map(self) -> None:
        """The weights will be written before they are read."""
        self.region.map(contents="preserve")

    def load(self) -> None:
        self.prefetcher.load(self.image, self.region).wait()

    def check(self) -> None:
        """Both ends and the middle of the region have the bytes of the image."""
        size = min(MIB, len(self.image) // 4)
        offsets = (0, len(self.image) // 2, len(self.image) - size)
        back = ak.HostImage.allocate(len(offsets) * size, device=self.setting.device)
        order = [(offset, i * size, size) for i, offset in enumerate(offsets)]
        self.prefetcher.store(self.region, back, order=order).wait()
        expected, found = memoryview(self.image), memoryview(back)
        for offset, at, _ in order:
            if found[at : at + size] != expected[offset : offset + size]:
                raise AssertionError(f"wrong bytes at {offset} of the region")


@contextmanager
def model(setting: Setting) -> Iterator[Model]:
    """Raises Skipped when it does not fit."""
    size = setting.model_bytes
    setting.require_device_memory(size)
    device = setting.device
    pool = ak.HostPool(device, size)  # goes with the last image in it
    image = ak.HostImage.allocate(size, pool=pool, name="weights")
    fill(image)
    with (
        ak.Prefetcher(device, chunk_bytes=setting.chunk_bytes) as prefetcher,
        ak.Arena(device, capacity_bytes=size) as arena,
    ):
        region = arena.reserve(size, owner="model", tag="weights")
        yield Model(setting, arena, image, region, prefetcher)


def fill(image: ak.HostImage) -> None:
    """Random bytes, of a period that is no power of two."""
    tile = np.random.default_rng(0).integers(0, 256, 5 * MIB + 1, dtype=np.uint8)
    view = np.asarray(memoryview(image))
    for begin in range(0, len(view), len(tile)):
        view[begin : begin + len(tile)] = tile[: len(view) - begin]


class Stopwatch:
    """Seconds by phase: `with watch("map"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds.setdefault(phase, []).append(time.perf_counter() - started)

    def __getitem__(self, phase: str) -> list[float]:
        return self.seconds[phase]


class PlainStream:
    """Copies by the driver's own calls, as anyone without a prefetcher would make them."""

    def __init__(self, device: ak.Device) -> None:
        self._driver = device._driver
        code, self._stream = self._driver.stream_create()
        require(code, "stream_create")

    def load(self, address: int, host: int, size_bytes: int) -> None:
        code = self._driver.memcpy_h2d_async(address, host, size_bytes, self._stream)
        require(code, "memcpy_h2d_async")

    def store(self, host: int, address: int, size_bytes: int) -> None:
        code = self._driver.memcpy_d2h_async(host, address, size_bytes, self._stream)
        require(code, "memcpy_d2h_async")

    def wait(self) -> None:
        require(self._driver.stream_synchronize(self._stream), "stream_synchronize")

    def close(self) -> None:
        require(self._driver.stream_destroy(self._stream), "stream_destroy")


def require(code: int, call: str) -> None:
    if code != 0:
        raise RuntimeError(f"{call} failed with code {code}")
