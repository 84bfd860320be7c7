// CRC-32C (Castagnoli), the checksum of iSCSI, ext4 and tensorizer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aegaeon {

// Uses the SSE4.2 instruction where the processor has it.
std::uint32_t crc32c(void const* data, std::size_t bytes) noexcept;
// The same in plain C++; the reference for the other.
std::uint32_t crc32c_portable(void const* data, std::size_t bytes) noexcept;

}  // namespace aegaeon
