"""Devices for the kernel tests: one behaviour suite, several drivers.

host: the embedded device. stub: the libcuda driver over a small CUDA library built here. cuda: the
real one (marker gpu).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_support import MIB, DeviceBytes, StubCuda, build_stub

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice

DEVICES = ["host", "stub"]
if "cuda:0" in ak.Device.available():  # elsewhere `pytest -m gpu` selects nothing, and fails
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(scope="session")
def stub_cuda(tmp_path_factory: pytest.TempPathFactory) -> StubCuda:
    return StubCuda(build_stub(tmp_path_factory.mktemp("stub")))


def open_device(kind: str, request: pytest.FixtureRequest) -> ak.Device:
    if kind == "stub":
        stub: StubCuda = request.getfixturevalue("stub_cuda")
        return ak.Device("cuda:0", library=stub.path)
    return ak.Device("cuda:0") if kind == "cuda" else ak.Device("host", memory_bytes=1024 * MIB)


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
