"""What several kernel test files share."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

import aegaeon_kernels as ak
from aegaeon_kernels.testing import SimulatedDevice

MIB = 1 << 20
GRANULE = 2 * MIB
DEVICES: list[Any] = ["host", "stub"]
if "cuda:0" in ak.Device.available():  # elsewhere `pytest -m gpu` selects nothing, and fails
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


class StubCuda:
    """The CUDA library of stub_libcuda.c, and what is alive in it."""

    KINDS: ClassVar = {
        "handles": "H",
        "reservations": "R",
        "mappings": "M",
        "registrations": "P",
        "contexts": "C",
        "streams": "s",
        "events": "e",
        "host_allocations": "h",
    }

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)

    def current_context(self) -> int | None:
        """Of the calling thread."""
        context = ctypes.c_void_p()
        assert self._library.cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value

    def fail(self, call: str, n: int = 1, code: int = 1) -> None:
        """The n-th call of that name from now on returns code, and does nothing else."""
        self._library.stub_fail(call.encode(), n, code)

    def fault_is_pending(self) -> bool:
        return bool(self._library.stub_fault_is_pending())

    @contextmanager
    def capturing(self, stream: int) -> Iterator[None]:
        """Inside the block the stream is captured into a graph, as torch captures: global mode.

        Fails if something that ran meanwhile broke the capture.
        """
        self._library.stub_capture(ctypes.c_void_p(stream), 0)
        try:
            yield
        finally:
            broken = self._library.stub_capture(None, 0)
        assert not broken, "a call that is unsafe during a capture has broken it"

    def take_thread_state(self) -> tuple[int, int]:
        """Of the calling thread: its mode towards captures, the depth of its stack of contexts.

        (0, 0) is how a thread starts, and how it goes on after this call.
        """
        return divmod(self._library.stub_take_thread_state(), 1000)

    def num_rdma_handles(self) -> int:
        return int(self._library.stub_live(ord("D")))

    def live(self) -> dict[str, int]:
        gc.collect()  # a caught exception keeps its frame, and so what the test had opened
        counts = {kind: self._library.stub_live(ord(key)) for kind, key in self.KINDS.items()}
        return {kind: count for kind, count in counts.items() if count}


def build_stub(folder: Path, *flags: str) -> Path:
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stub_libcuda.c")
    compiler = os.environ.get("CC", "cc")
    options = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
    subprocess.run([compiler, *options, *flags, source, "-o", library], check=True)
    return library


def open_device(kind: str, request: pytest.FixtureRequest) -> ak.Device:
    if kind == "stub":
        stub: StubCuda = request.getfixturevalue("stub_cuda")
        return ak.Device("cuda:0", library=stub.path)
    if kind == "simulated":
        return SimulatedDevice(memory_bytes=1024 * MIB)
    return ak.Device("cuda:0") if kind == "cuda" else ak.Device("host", memory_bytes=1024 * MIB)


class DeviceBytes:
    """Reads and writes device memory by the driver's own copies, so it works on every device."""

    def __init__(self, device: ak.Device) -> None:
        self._driver = device._driver
        code, self._stream = self._driver.stream_create()
        assert code == 0

    @property
    def stream(self) -> int:
        """What its copies are on."""
        return int(self._stream)

    def write(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        data = np.ascontiguousarray(data)
        code = self._driver.memcpy_h2d_async(address, data.ctypes.data, data.nbytes, self._stream)
        assert code == 0
        self._driver.stream_synchronize(self._stream)

    def fill(self, address: int, value: int, size_bytes: int) -> None:
        assert self._driver.memset_async(address, value, size_bytes, self._stream) == 0
        self._driver.stream_synchronize(self._stream)

    def read(self, address: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        data = np.empty(size_bytes, np.uint8)
        code = self._driver.memcpy_d2h_async(data.ctypes.data, address, size_bytes, self._stream)
        assert code == 0
        self._driver.stream_synchronize(self._stream)
        return data

    def close(self) -> None:
        self._driver.stream_destroy(self._stream)


def assert_ledger(arena: ak.Arena) -> ak.ArenaStats:
    """The invariants of the accounting, whatever happened before."""
    stats = arena.stats()
    total = stats.owned_bytes + stats.free_bytes + stats.quarantined_bytes
    assert total == stats.capacity_bytes == arena.capacity_bytes
    assert stats.created_bytes <= stats.capacity_bytes
    granularity = arena.device.granularity_bytes
    if stats.handle_bytes != granularity:
        made = stats.num_handles * stats.handle_bytes + stats.num_tail_handles * granularity
        assert made == stats.created_bytes
    assert all(stats.owners.values()), "an owner of nothing is still listed"
    return stats


def pattern(size_bytes: int, seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)


def num_descriptors() -> int:
    """Open ones of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def run_program(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own: for crashes and for what import does."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
