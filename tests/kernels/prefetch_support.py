"""What the test files of the prefetcher share."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from kernel_support import DEVICES, GRANULE, pattern

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

# Also one whose copies happen at the last moment: a wait too few shows every time.
TRANSFER_DEVICES = [*DEVICES, "simulated"]
SIZE = 16 * GRANULE
CHUNK = GRANULE
SOON = 20.0  # a generous time for what takes milliseconds


class Setup:
    """An image and a mapped region of SIZE bytes, and a prefetcher with small chunks."""

    def __init__(self, device: FaultyDevice, size: int = SIZE) -> None:
        self.device = device
        self.arena = ak.Arena(device, capacity_bytes=4 * size, handle_bytes=4 * GRANULE)
        self.region = self.arena.reserve(size, owner="a", tag="weights")
        self.region.map()
        self.data = pattern(size, seed=5)
        self.image = self.new_image(self.data)
        self.prefetcher = ak.Prefetcher(device, chunk_bytes=CHUNK, depth=2)
        device.reset()

    def new_image(self, data: npt.NDArray[np.uint8]) -> ak.HostImage:
        image = ak.HostImage.allocate(len(data), device=self.device)
        np.frombuffer(image, np.uint8)[:] = data
        return image

    def load(self, **options: object) -> ak.Ticket:
        return self.prefetcher.load(self.image, self.region, **options)

    def offsets(self) -> list[tuple[int, int]]:
        """(offset, size) of the copies so far, in granules where they are whole."""
        return [(address - self.region.address, size) for _, address, size in self.device.copies]

    def close(self) -> None:
        self.prefetcher.close()
        self.arena.close()
        del self.image
        gc.collect()  # caught exceptions keep frames, and these the image
        assert self.device.live == {}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.001)
