"""HostImage: bytes, checksums, and what a seal promises."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import MIB, pattern

import aegaeon_kernels as ak
from aegaeon_kernels import _C
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal

CHUNK = _C.IMAGE_CHUNK_BYTES


def test_an_image_is_zero_writable_memory_of_its_size(device: FaultyDevice) -> None:
    image = ak.HostImage.allocate(3 * MIB + 7, device=device, name="qwen")
    view = memoryview(image)
    assert (len(image), image.size_bytes, view.nbytes, view.readonly) == (*[3 * MIB + 7] * 3, False)
    assert (image.name, image.sealed) == ("qwen", False)
    assert image.pinned == (device.kind == "cuda")
    array = np.frombuffer(image, np.uint8)
    assert not array.any()
    array[-1] = 77
    assert ctypes.c_uint8.from_address(image.address + 3 * MIB + 6).value == 77
    del view, array, image
    assert device.live == {}


def test_views_keep_the_memory(host: FaultyDevice) -> None:
    image = ak.HostImage.allocate(MIB, device=host)
    array = np.frombuffer(image, np.uint8)
    tensor = image.tensor()
    del image
    array[:] = 3
    assert (tensor.numpy() == 3).all()
    del array
    assert host.live == {"host_allocations": 1}
    del tensor
    assert host.live == {}


def test_an_image_needs_no_device() -> None:
    image = ak.HostImage.allocate(10)
    assert bytes(image) == bytes(10)
    assert not image.pinned


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_image_is_the_callers_mistake(size: int) -> None:
    with pytest.raises(ValueError, match="size_bytes"):
        ak.HostImage.allocate(size)


def test_a_device_out_of_host_memory_is_out_of_memory(host: FaultyDevice) -> None:
    host.fail_call(1, call="host_alloc", code=2)
    with pytest.raises(ak.OutOfMemory) as caught:
        ak.HostImage.allocate(5 * MIB, device=host)
    assert caught.value.bytes == 5 * MIB


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 1])
def test_a_sealed_image_verifies_until_a_byte_changes(size: int) -> None:
    image = ak.HostImage.allocate(size, name="weights of qwen")
    array = np.frombuffer(image, np.uint8)
    array[:] = pattern(size, seed=size)
    image.seal()
    image.verify()
    assert len(image.checksums()) == -(-size // CHUNK)
    for at in {0, size // 2, size - 1}:
        array[at] ^= 16
        with pytest.raises(ak.IntegrityError) as caught:
            image.verify()
        chunk = at // CHUNK
        end = min((chunk + 1) * CHUNK, size)
        assert f"chunk {chunk} [{chunk * CHUNK}, {end})" in str(caught.value)
        assert "weights of qwen" in str(caught.value)
        array[at] ^= 16
        image.verify()


def test_all_bad_chunks_are_named() -> None:
    image = ak.HostImage.allocate(4 * CHUNK)
    image.seal()
    array = np.ctypeslib.as_array((ctypes.c_uint8 * image.size_bytes).from_address(image.address))
    array[CHUNK] = 1
    array[3 * CHUNK + 5] = 1
    with pytest.raises(ak.IntegrityError, match=r"2 of 4 chunks .*chunk 1 .*chunk 3 "):
        image.verify()


def test_swapped_chunks_are_found() -> None:
    image = ak.HostImage.allocate(2 * CHUNK)
    array = np.frombuffer(image, np.uint8)
    array[:] = pattern(2 * CHUNK, seed=1)
    image.seal()
    array[:] = np.roll(array, CHUNK)
    with pytest.raises(ak.IntegrityError, match="2 of 2"):
        image.verify()


def test_a_seal_is_once_and_makes_new_views_read_only() -> None:
    image = ak.HostImage.allocate(100)
    with pytest.raises(ak.LifecycleError, match="not sealed"):
        image.verify()
    with pytest.raises(ak.LifecycleError, match="not sealed"):
        image.checksums()
    image.seal()
    assert image.sealed
    assert memoryview(image).readonly
    assert not np.frombuffer(image, np.uint8).flags.writeable
    with pytest.raises(ak.LifecycleError, match="sealed already"):
        image.seal()


def test_the_checksum_is_crc32c() -> None:
    # RFC 3720, appendix B.4
    vectors = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    for data, expected in {**vectors, b"123456789": 0xE3069283, b"": 0}.items():
        assert _C.crc32c(data, before=0) == expected
        assert _C.crc32c_portable(data, before=0) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 600_000), st.integers(0, 2**32 - 1), st.integers(0, 600_000))
def test_both_checksum_implementations_agree(size: int, seed: int, cut: int) -> None:
    data = pattern(size, seed).tobytes()
    expected = _C.crc32c_portable(data, before=0)
    assert _C.crc32c(data, before=0) == expected
    for first, second in [(_C.crc32c, _C.crc32c_portable), (_C.crc32c_portable, _C.crc32c)]:
        assert second(data[cut:], before=first(data[:cut], before=0)) == expected


def test_seal_agrees_with_the_checksum_of_the_bytes() -> None:
    image = ak.HostImage.allocate(CHUNK + 1000)
    np.frombuffer(image, np.uint8)[:] = pattern(CHUNK + 1000, seed=2)
    data = bytes(image)
    image.seal()
    first, second = data[:CHUNK], data[CHUNK:]
    sums = [_C.crc32c(first, before=0), _C.crc32c_portable(second, before=0)]
    assert image.checksums() == sums


def test_tensors_over_an_image() -> None:
    image = ak.HostImage.allocate(64)
    image.tensor((4, 4), torch.bfloat16, 32).fill_(1)
    ones = torch.ones(16, dtype=torch.bfloat16)
    assert_bitwise_equal(image.tensor()[32:], ones.view(torch.uint8))
    assert image.tensor(dtype=torch.float32).shape == (16,)
    for shape, offset in [((17,), 0), ((1,), 64), ((1,), 2), ((1,), -4), ((0,), 0)]:
        with pytest.raises(ValueError, match="offset"):
            image.tensor(shape, torch.float32, offset)
