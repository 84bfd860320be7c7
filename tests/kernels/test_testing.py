"""Comparison and faults on demand: what other tests rest on tells the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_support import GRANULE

import aegaeon_kernels as ak
from aegaeon_kernels.testing import FaultyDevice, assert_bitwise_equal


def test_equal_bytes_are_equal_even_where_values_are_not() -> None:
    nan = np.array([np.nan, 1.0], np.float32)
    assert_bitwise_equal(nan, nan.copy())
    assert_bitwise_equal(b"abc", bytearray(b"abc"))
    with pytest.raises(AssertionError):
        assert_bitwise_equal(np.array([0.0]), np.array([-0.0]))


def test_the_first_different_byte_is_named() -> None:
    a = np.zeros((3, 4), np.int32)
    b = a.copy()
    b[1, 2] = 0x0500
    b[2, 0] = 1
    with pytest.raises(AssertionError) as caught:
        assert_bitwise_equal(a, b, what="kv")
    message = str(caught.value)
    assert message.startswith("kv: 2 of 48 bytes differ; the first is byte 25: 0x00, expected 0x05")
    assert "element (1, 2): 0, expected 1280" in message


def test_different_shapes_are_different() -> None:
    with pytest.raises(AssertionError, match=r"\(4,\) of 1-byte items against \(2, 2\)"):
        assert_bitwise_equal(np.zeros(4, np.uint8), np.zeros((2, 2), np.uint8))
    with pytest.raises(AssertionError, match="2-byte"):
        assert_bitwise_equal(np.zeros(4, np.uint8), np.zeros(4, np.uint16))


def test_tensors_without_a_numpy_type_are_compared() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        a = torch.ones(6, dtype=torch.float32).to(dtype)
        assert_bitwise_equal(a, a.clone())
        b = a.clone()
        b[4] = 2
        with pytest.raises(AssertionError, match=r"element \(4,\)"):
            assert_bitwise_equal(a, b)


def test_faults_come_when_asked_for(host: FaultyDevice) -> None:
    arena = ak.Arena(host, capacity_bytes=4 * GRANULE, handle_bytes=GRANULE)
    region = arena.reserve(4 * GRANULE, owner="a")
    host.reset()
    host.fail_call(2, call="mem_map", code=700)
    with pytest.raises(ak.DriverError) as caught:
        region.map()
    assert (caught.value.call, caught.value.code, caught.value.bytes) == ("mem_map", 700, GRANULE)
    assert host.calls == {"mem_create": 4, "mem_map": 2, "mem_unmap": 1}
    region.map()
    region.unmap()
    host.fail_call(1, call="mem_map", persistent=True)
    for _ in range(2):
        with pytest.raises(ak.DriverError):
            region.map()
    host.reset()
    region.map()
    assert host.live == {"handles": 4, "reservations": 1, "mappings": 4}
    with pytest.raises(ValueError, match="n=0"):
        host.fail_call(0)
