"""Devices for the kernel tests: one behaviour suite, several drivers.

host: the embedded device. stub: the libcuda driver over a small CUDA library built here. cuda: the
real one (marker gpu).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_support import DEVICES, MIB, DeviceBytes, StubCuda, build_stub, open_device
from prefetch_support import Setup

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice


@pytest.fixture(scope="session")
def stub_cuda(tmp_path_factory: pytest.TempPathFactory) -> StubCuda:
    return StubCuda(build_stub(tmp_path_factory.mktemp("stub")))


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
