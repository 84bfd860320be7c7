"""A device that is lost ends the step loop; a model that fails alone does not."""

import pytest

import aegaeon_kernels as ak
from aegaeon.core.errors import DeviceLost
from aegaeon.switching.device_check import raise_if_lost
from aegaeon_kernels.testing import FaultyDevice

BROKEN = RuntimeError("an illegal memory access was encountered")


def faulty() -> FaultyDevice:
    return FaultyDevice(ak.Device("host", memory_bytes=1 << 24))


def test_a_device_that_answers_is_not_lost():
    raise_if_lost(faulty(), "a", BROKEN, ["b"])


def test_a_device_on_which_every_call_fails_is_lost():
    device = faulty()
    device.fail_call(1, persistent=True)
    with pytest.raises(DeviceLost, match="the device does not answer") as caught:
        raise_if_lost(device, "a", BROKEN, ["b"])
    assert caught.value.__cause__ is BROKEN


def test_without_a_model_that_works_the_reason_of_the_last_one_is_given():
    with pytest.raises(DeviceLost, match="all models are out of service, a for: an illegal"):
        raise_if_lost(faulty(), "a", BROKEN, [])
