"""What tests and benchmarks of memory code need: faults on demand, bitwise comparison."""

from aegaeon_kernels.testing.faults import FaultyDevice
from aegaeon_kernels.testing.numeric import assert_bitwise_equal

__all__ = ["FaultyDevice", "assert_bitwise_equal"]
