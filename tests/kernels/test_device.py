"""Opening devices: names, capacities, and what is said when there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_support import GRANULE, MIB, StubCuda, build_stub, run_program

import aegaeon_kernels as ak


def test_host_is_always_available(stub_cuda: StubCuda, tmp_path: Path) -> None:
    assert ak.Device.available()[0] == "host"
    assert ak.Device.available(library=stub_cuda.path) == ["host", "cuda:0"]
    assert ak.Device.available(library=str(tmp_path / "none.so")) == ["host"]


def test_the_host_device_has_the_memory_it_is_given() -> None:
    device = ak.Device("host", memory_bytes=64 * MIB)
    assert device.memory_info() == (64 * MIB, 64 * MIB)
    assert (device.name, device.kind) == ("host", "host")
    assert ak.Device("host").memory_info()[1] > 256 * MIB
    arena = ak.Arena(device, capacity_bytes=48 * MIB)
    region = arena.reserve(48 * MIB, owner="a")
    region.map()
    assert device.memory_info() == (16 * MIB, 64 * MIB)


@pytest.mark.parametrize("name", ["", "gpu", "host:1", "cuda:x", "cuda:-1", "cpu"])
def test_an_unknown_device_is_the_callers_mistake(name: str, stub_cuda: StubCuda) -> None:
    with pytest.raises(ValueError, match="unknown device"):
        ak.Device(name, library=stub_cuda.path)


def test_sizes_are_for_the_host_device_only(stub_cuda: StubCuda) -> None:
    with pytest.raises(ValueError, match="memory_bytes"):
        ak.Device("cuda:0", memory_bytes=GRANULE, library=stub_cuda.path)
    with pytest.raises(ValueError, match="memory_bytes"):
        ak.Device("host", memory_bytes=0)


def test_without_a_driver_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ak.DriverError) as caught:
        ak.Device("cuda:0", library=str(tmp_path / "libcuda.so.1"))
    assert caught.value.call == "dlopen"
    for part in ("no CUDA driver", "libcuda.so.1", "install the NVIDIA driver", 'Device("host")'):
        assert part in str(caught.value)


def test_a_library_that_is_no_driver_is_named(tmp_path: Path) -> None:
    text = tmp_path / "libcuda.so.1"
    text.write_text("not a library")
    with pytest.raises(ak.DriverError, match="cannot open"):
        ak.Device("cuda:0", library=str(text))


def test_an_old_driver_is_told_what_it_lacks(tmp_path: Path) -> None:
    library = build_stub(tmp_path, "-DSTUB_WITHOUT_VMM")
    with pytest.raises(ak.DriverError, match=r"has no cuMem\w+.*update it") as caught:
        ak.Device("cuda:0", library=str(library))
    assert (caught.value.call, caught.value.code) == ("dlsym", 801)


def test_a_device_that_does_not_exist_is_counted_out(
    stub_cuda: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ak.DriverError, match=r"no device cuda:3: the driver reports 1 device"):
        ak.Device("cuda:3", library=stub_cuda.path)
    monkeypatch.setenv("STUB_CUDA_DEVICES", "0")
    with pytest.raises(ak.DriverError, match="reports 0 device"):
        ak.Device("cuda", library=stub_cuda.path)
    assert ak.Device.available(library=stub_cuda.path) == ["host"]


def test_a_device_without_virtual_memory_is_refused(
    stub_cuda: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_CUDA_VMM", "0")
    with pytest.raises(ak.DriverError, match="no virtual memory management"):
        ak.Device("cuda:0", library=stub_cuda.path)
    assert stub_cuda.live() == {}


def test_the_context_is_kept_while_the_device_is_used(stub_cuda: StubCuda) -> None:
    device = ak.Device("cuda", library=stub_cuda.path)
    assert (device.name, device.kind) == ("cuda:0", "cuda")
    assert stub_cuda.live() == {"contexts": 1}
    arena = ak.Arena(device, capacity_bytes=GRANULE)
    region = arena.reserve(GRANULE, owner="a")
    del device, arena
    assert stub_cuda.live() == {"contexts": 1, "reservations": 1}
    del region
    assert stub_cuda.live() == {}


def test_other_libraries_context_is_put_back(stub_cuda: StubCuda) -> None:
    device = ak.Device("cuda", library=stub_cuda.path)
    code, stream = device._driver.stream_create()
    assert code == 0
    assert not stub_cuda.current_context(), "the calling thread's context is not ours to change"
    assert device._driver.stream_destroy(stream) == 0


def test_import_needs_no_gpu_no_torch_and_starts_nothing() -> None:
    result = run_program(
        "import sys, threading, os\n"
        "before = dict(os.environ)\n"
        "import aegaeon_kernels, aegaeon_kernels.testing\n"
        "assert 'torch' not in sys.modules and 'cupy' not in sys.modules\n"
        "assert 'aegaeon' not in sys.modules and 'vllm' not in sys.modules\n"
        "assert len(os.listdir('/proc/self/task')) == 1 or 'numpy' in sys.modules\n"
        "assert dict(os.environ) == before\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda' not in maps and 'libtorch' not in maps\n"
    )
    assert result.returncode == 0, result.stderr
