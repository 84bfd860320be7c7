"""Devices for the kernel tests: one behaviour suite, several drivers.

host: the embedded device. stub: the libcuda driver over a small CUDA library built here. cuda: the
real one (marker gpu). And what several files begin with: checkpoints, folders, other processes.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fill_support import random_tensor
from kernel_support import DEVICES, MIB, DeviceBytes, StubCuda, build_stub, open_device
from native_support import build_program
from prefetch_support import Setup
from safetensors.torch import save_file
from shared_image_support import Peer

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice


@pytest.fixture(scope="session")
def stub_cuda(tmp_path_factory: pytest.TempPathFactory) -> StubCuda:
    return StubCuda(build_stub(tmp_path_factory.mktemp("stub")))


@pytest.fixture(scope="session")
def native_program() -> Path:
    return build_program()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> FaultyDevice:
    """A device that counts what is alive on it."""
    return FaultyDevice(open_device(request.param, request))


@pytest.fixture
def host() -> FaultyDevice:
    """The host device only: for what a second driver would not tell more about."""
    return FaultyDevice(ak.Device("host", memory_bytes=1024 * MIB))


@pytest.fixture
def device_bytes(device: FaultyDevice) -> Iterator[DeviceBytes]:
    access = DeviceBytes(device)
    yield access
    access.close()


@pytest.fixture
def host_bytes(host: FaultyDevice) -> Iterator[DeviceBytes]:
    access = DeviceBytes(host)
    yield access
    access.close()


@pytest.fixture
def setup(device: FaultyDevice) -> Iterator[Setup]:
    """Something to transfer."""
    setup = Setup(device)
    yield setup
    setup.close()


@pytest.fixture
def stub(stub_cuda: StubCuda) -> Iterator[StubCuda]:
    yield stub_cuda
    stub_cuda.fail("", n=0)
    assert stub_cuda.take_thread_state() == (0, 0), "the calling thread is not as it was"
    assert stub_cuda.live().keys() <= {"contexts"}, "something is left behind"


@pytest.fixture
def driver(stub: StubCuda) -> _C.Driver:
    return ak.Device("cuda:0", library=stub.path)._driver


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Three chunks and a bit, of which one tensor is larger than a chunk."""
    tensors = {f"layers.{i}.w": random_tensor((1000 + i, 999), torch.bfloat16, i) for i in range(7)}
    tensors["embed.weight"] = random_tensor((5, MIB), torch.float16, 8)
    tensors["norm.weight"] = random_tensor((77,), torch.float32, 9)
    return tensors


@pytest.fixture
def file(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, as in use; and afterwards nothing is in it."""
    gc.collect()
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)
        gc.collect()
        assert list(Path(name).iterdir()) == [], "a file is left"
    assert set(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


@pytest.fixture
def peers(folder: Path) -> Iterator[list[Peer]]:
    started = [Peer(folder), Peer(folder)]
    yield started
    for peer in started:
        peer.close()
