// Spoilt image files through their parser, in memory that ends where they do; about half of them
// with checksums that are right again, so that what is behind the checksum is reached.
#include <span>

#include "tests/support.hpp"
#include "transfer/crc32c.hpp"
#include "transfer/image_footer.hpp"

namespace aegaeon::tests {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::size_t kUncovered = 12;  // of the tail: the checksum and the magic

Bytes random_image(Random& random) {
  Bytes payload(1 + random.below(random.one_in(2) ? 9'000 : 64));
  for (auto& byte : payload) byte = static_cast<std::byte>(random.below(256));
  ImageFooter footer{.payload_bytes = payload.size(),
                     .checksums = {crc32c(payload.data(), payload.size())},
                     .metadata = std::string(random.below(40), 'm'),
                     .layout = std::string(random.below(200), 'l')};
  auto behind = footer.serialize();
  payload.insert(payload.end(), behind.begin(), behind.end());
  return payload;
}

std::uint64_t interesting(Random& random) {
  static constexpr std::uint64_t kNumbers[] = {0,
                                               1,
                                               63,
                                               64,
                                               65,
                                               4096,
                                               std::uint64_t{8} << 20,
                                               (std::uint64_t{1} << 46) + 1,
                                               std::uint64_t{1} << 63,
                                               ~std::uint64_t{0},
                                               ~std::uint64_t{0} - 4095};
  return random.one_in(4) ? random.below(1u << 31) : kNumbers[random.below(std::size(kNumbers))];
}

void spoil(Bytes& file, Random& random) {
  for (auto i = 1 + random.below(3); i > 0 && !file.empty(); --i) {
    auto at = random.below(file.size());
    switch (random.below(6)) {
      case 0:
        file[at] ^= static_cast<std::byte>(1 + random.below(255));
        break;
      case 1:
        file.resize(at);
        break;
      case 2:
        file.insert(file.begin() + static_cast<std::ptrdiff_t>(at), 1 + random.below(80),
                    std::byte{0});
        break;
      case 3:
        file.erase(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(at));
        break;
      default:  // a number of the tail
        if (file.size() < kImageTailBytes) break;
        auto number = interesting(random);
        auto width = random.one_in(2) ? 4u : 8u;
        auto in_tail = random.below((kImageTailBytes - 8) / 4) * 4;
        std::memcpy(file.data() + file.size() - kImageTailBytes + in_tail, &number, width);
    }
  }
}

// The checksum of the footer, where the tail's sizes leave one to be computed.
void mend_checksum(Bytes& file) {
  if (file.size() < kImageTailBytes) return;
  std::uint64_t payload = 0;
  std::memcpy(&payload, file.data() + file.size() - kImageTailBytes, sizeof payload);
  if (payload > file.size() - kUncovered) return;
  auto sum = crc32c(file.data() + payload, file.size() - payload - kUncovered);
  std::memcpy(file.data() + file.size() - kUncovered, &sum, sizeof sum);
}

}  // namespace

void images_fuzz(std::size_t num_files) {
  std::size_t num_valid = 0, num_behind_checksum = 0;
  for (std::size_t i = 0; i < num_files; ++i) {
    Random random(static_cast<std::uint32_t>(i));
    auto file = random_image(random);
    if (!random.one_in(10)) spoil(file, random);
    if (random.one_in(2)) mend_checksum(file);
    Bytes exact(file.begin(), file.end());
    exact.shrink_to_fit();
    try {
      auto footer = parse_image(exact, "f");
      auto behind = footer.serialize();
      require(
          footer.payload_bytes + behind.size() == exact.size() &&
              std::memcmp(exact.data() + footer.payload_bytes, behind.data(), behind.size()) == 0,
          "what parses serialises to the same bytes");
      ++num_valid;
    } catch (IntegrityError const& error) {
      std::string_view message = error.what();
      require(message.starts_with("f: "), "the message names the file");
      num_behind_checksum +=
          message.find("chunks differ") != message.npos || message.find("not zero") != message.npos;
    }
  }
  require(num_valid > num_files / 20 && num_valid < num_files / 2, "both verdicts are common");
  require(num_behind_checksum > num_files / 50, "the checksum does not hide what is behind it");
}

}  // namespace aegaeon::tests
