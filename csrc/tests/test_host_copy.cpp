// Copies of the host device: every byte of odd sizes at odd addresses, no byte beside them, and
// overlapping ranges as memmove has them.
#include "driver/host_copy.hpp"

#include "tests/support.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kRoom = 4 * kStreamingBytes;

// Copies within a random buffer, and asks memmove what it should look like.
void check_copy(Random& random, std::size_t to, std::size_t from, std::size_t bytes) {
  static std::vector<std::uint64_t> words(kRoom / sizeof(std::uint64_t));
  for (auto& word : words) word = random.below(SIZE_MAX) * 0x9e3779b97f4a7c15;
  auto* buffer = reinterpret_cast<std::byte*>(words.data());
  std::vector<std::byte> expected(buffer, buffer + kRoom);
  std::memmove(expected.data() + to, expected.data() + from, bytes);
  copy_bytes(buffer + to, buffer + from, bytes);
  require(std::memcmp(buffer, expected.data(), kRoom) == 0,
          concat("a copy of ", bytes, " bytes from ", from, " to ", to, " is exact"));
}

}  // namespace

void host_copy(std::size_t num_rounds) {
  Random random(1);
  std::size_t half = kRoom / 2;
  check_copy(random, 0, half, 0);
  for (std::size_t i = 0; i < num_rounds; ++i) {
    // Around the size where streaming starts, and around whole lines above it.
    std::size_t bytes = kStreamingBytes - 2 + random.below(5) + random.below(3) * 64;
    check_copy(random, random.below(130), half + random.below(130), bytes);
    check_copy(random, half + random.below(130), random.below(130), random.below(half / 2));
  }
  for (std::size_t distance : {1, 15, 16, 63, 64, 4096, 1 << 19}) {
    std::size_t bytes = kStreamingBytes + random.below(1000);
    check_copy(random, 7, 7 + distance, bytes);
    check_copy(random, 7 + distance, 7, bytes);
  }
  std::size_t bytes = kStreamingBytes + 3;
  check_copy(random, 5, 5, bytes);
  check_copy(random, 5, 5 + bytes, bytes);  // neighbours
  check_copy(random, 5 + bytes, 5, bytes);
}

}  // namespace aegaeon::tests
