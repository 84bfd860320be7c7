"""What tests and benchmarks of memory code need: faults on demand, exact times, comparison."""

from aegaeon_kernels.testing.faults import FaultyDevice
from aegaeon_kernels.testing.numeric import assert_bitwise_equal
from aegaeon_kernels.testing.simulated import SimulatedCopy, SimulatedDevice

__all__ = ["FaultyDevice", "SimulatedCopy", "SimulatedDevice", "assert_bitwise_equal"]
