"""After a model has failed: whether anything can be run on the device any more."""

from collections.abc import Collection

import aegaeon_kernels as ak
from aegaeon.core.errors import DeviceLost


def raise_if_lost(
    device: ak.Device, model: str, error: BaseException, still_served: Collection[str]
) -> None:
    """Raises DeviceLost when `device` does not answer, or when no model is left.

    An error of a kernel stays with the context of the device, and every later call fails with it:
    what looks like one model's failure is then the end of all.
    """
    try:
        device.memory_info()
    except ak.Error as broken:
        raise DeviceLost(f"the device does not answer: {broken}") from error
    if not still_served:
        raise DeviceLost(f"all models are out of service, {model} for: {error}") from error
