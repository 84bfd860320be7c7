// CRC-32C (Castagnoli), the checksum of iSCSI, ext4 and tensorizer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aegaeon {

// Uses the SSE4.2 instruction where the processor has it. `before` is the checksum of the bytes in
// front of these: a long piece of data may be taken in parts.
std::uint32_t crc32c(void const* data, std::size_t bytes, std::uint32_t before = 0) noexcept;
// The same in plain C++; the reference for the other.
std::uint32_t crc32c_portable(void const* data, std::size_t bytes,
                              std::uint32_t before = 0) noexcept;

}  // namespace aegaeon
