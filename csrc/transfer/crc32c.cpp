#include "transfer/crc32c.hpp"

#include <array>
#include <cstring>

namespace aegaeon {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // bit-reversed

constexpr auto kTables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][i] = crc;
  }
  for (std::uint32_t i = 0; i < 256; ++i) {
    for (std::size_t t = 1; t < 8; ++t) {
      tables[t][i] = (tables[t - 1][i] >> 8) ^ tables[0][tables[t - 1][i] & 0xFF];
    }
  }
  return tables;
}();

// Both work on the register, that is without the inversions at the ends.
std::uint32_t update_portable(std::uint32_t crc, unsigned char const* data, std::size_t bytes) {
  for (; bytes >= 8; data += 8, bytes -= 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= crc;
    crc = 0;
    for (std::size_t i = 0; i < 8; ++i) crc ^= kTables[7 - i][(word >> (8 * i)) & 0xFF];
  }
  for (; bytes > 0; ++data, --bytes) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xFF];
  return crc;
}

#if defined(__x86_64__)

// The instruction takes three cycles but one can start every cycle: three independent lanes.
constexpr std::size_t kLaneBytes = 64 * 1024;

// Advancing a register over zero bytes is linear in its bits: the images of the 32 bits, here for
// kLaneBytes zeros, as four tables of one byte each.
constexpr auto kOverLane = [] {
  std::array<std::uint32_t, 32> over{};
  for (std::size_t bit = 0; bit < 32; ++bit) {  // one zero byte
    std::uint32_t crc = std::uint32_t{1} << bit;
    over[bit] = (crc >> 8) ^ kTables[0][crc & 0xFF];
  }
  for (std::size_t bytes = 1; bytes < kLaneBytes; bytes *= 2) {  // squaring doubles the length
    std::array<std::uint32_t, 32> twice{};
    for (std::size_t bit = 0; bit < 32; ++bit) {
      for (std::size_t i = 0; i < 32; ++i) {
        if ((over[bit] >> i) & 1) twice[bit] ^= over[i];
      }
    }
    over = twice;
  }
  std::array<std::array<std::uint32_t, 256>, 4> tables{};
  for (std::size_t byte = 0; byte < 4; ++byte) {
    for (std::size_t value = 0; value < 256; ++value) {
      for (std::size_t i = 0; i < 8; ++i) {
        if ((value >> i) & 1) tables[byte][value] ^= over[8 * byte + i];
      }
    }
  }
  return tables;
}();

std::uint32_t advance_over_lane(std::uint32_t crc) {
  return kOverLane[0][crc & 0xFF] ^ kOverLane[1][(crc >> 8) & 0xFF] ^
         kOverLane[2][(crc >> 16) & 0xFF] ^ kOverLane[3][crc >> 24];
}

__attribute__((target("sse4.2"))) std::uint32_t update_sse42(std::uint32_t crc,
                                                             unsigned char const* data,
                                                             std::size_t bytes) {
  auto load = [](unsigned char const* from) {
    std::uint64_t word;
    std::memcpy(&word, from, 8);
    return word;
  };
  for (; bytes >= 3 * kLaneBytes; data += 3 * kLaneBytes, bytes -= 3 * kLaneBytes) {
    std::uint64_t a = crc, b = 0, c = 0;
    for (std::size_t i = 0; i < kLaneBytes; i += 8) {
      a = __builtin_ia32_crc32di(a, load(data + i));
      b = __builtin_ia32_crc32di(b, load(data + kLaneBytes + i));
      c = __builtin_ia32_crc32di(c, load(data + 2 * kLaneBytes + i));
    }
    crc = advance_over_lane(static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
    crc = advance_over_lane(crc) ^ static_cast<std::uint32_t>(c);
  }
  std::uint64_t wide = crc;
  for (; bytes >= 8; data += 8, bytes -= 8) wide = __builtin_ia32_crc32di(wide, load(data));
  crc = static_cast<std::uint32_t>(wide);
  for (; bytes > 0; ++data, --bytes) crc = __builtin_ia32_crc32qi(crc, *data);
  return crc;
}

#endif

}  // namespace

std::uint32_t crc32c_portable(void const* data, std::size_t bytes, std::uint32_t before) noexcept {
  return ~update_portable(~before, static_cast<unsigned char const*>(data), bytes);
}

std::uint32_t crc32c(void const* data, std::size_t bytes, std::uint32_t before) noexcept {
#if defined(__x86_64__)
  static bool const has_instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (has_instruction) {
    return ~update_sse42(~before, static_cast<unsigned char const*>(data), bytes);
  }
#endif
  return crc32c_portable(data, bytes, before);
}

}  // namespace aegaeon
