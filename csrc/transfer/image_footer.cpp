#include "transfer/image_footer.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "error.hpp"
#include "transfer/crc32c.hpp"

namespace aegaeon {
namespace {

static_assert(std::endian::native == std::endian::little,
              "the file's numbers are copied as they are");

constexpr std::size_t kPageBytes = 4096;
constexpr std::uint32_t kVersion = 1;
constexpr std::array<char, 8> kMagic{'A', 'E', 'G', 'I', 'M', 'A', 'G', 'E'};

struct Tail {
  std::uint64_t payload_bytes;
  std::uint64_t chunk_bytes;
  std::uint32_t metadata_bytes;
  std::uint32_t layout_bytes;
  std::array<std::uint64_t, 3> zeros;
  std::uint32_t version;
  std::uint32_t checksum;
  std::array<char, 8> magic;
};
static_assert(sizeof(Tail) == kImageTailBytes && alignof(Tail) == 8);
// Of the footer, what the checksum does not cover: itself and the magic behind it.
constexpr std::size_t kUncoveredBytes = sizeof(Tail::checksum) + sizeof(Tail::magic);

constexpr std::size_t padding_bytes(std::size_t payload_bytes) noexcept {
  return (kPageBytes - payload_bytes % kPageBytes) % kPageBytes;
}

[[noreturn]] void refuse(std::string const& file, std::string const& why) {
  throw IntegrityError(concat(file, ": ", why));
}

}  // namespace

std::vector<std::byte> ImageFooter::serialize() const {
  Tail tail{.payload_bytes = payload_bytes,
            .chunk_bytes = kImageChunkBytes,
            .metadata_bytes = static_cast<std::uint32_t>(metadata.size()),
            .layout_bytes = static_cast<std::uint32_t>(layout.size()),
            .zeros = {},
            .version = kVersion,
            .checksum = 0,
            .magic = kMagic};
  std::vector<std::byte> bytes(padding_bytes(payload_bytes));
  auto append = [&](void const* data, std::size_t size) {
    auto const* from = static_cast<std::byte const*>(data);
    bytes.insert(bytes.end(), from, from + size);
  };
  append(checksums.data(), checksums.size() * sizeof(std::uint32_t));
  append(metadata.data(), metadata.size());
  append(layout.data(), layout.size());
  append(&tail, sizeof tail);
  tail.checksum = crc32c(bytes.data(), bytes.size() - kUncoveredBytes);
  std::memcpy(bytes.data() + bytes.size() - kUncoveredBytes, &tail.checksum, sizeof tail.checksum);
  return bytes;
}

std::size_t ImageTail::footer_bytes() const noexcept {
  return padding_bytes(payload_bytes) + num_image_chunks(payload_bytes) * sizeof(std::uint32_t) +
         metadata_bytes + layout_bytes + kImageTailBytes;
}

ImageTail parse_image_tail(std::span<std::byte const, kImageTailBytes> bytes,
                           std::size_t file_bytes, std::string const& file) {
  Tail tail{};
  std::memcpy(&tail, bytes.data(), sizeof tail);
  if (tail.magic != kMagic) refuse(file, "not an image, or its end is missing");
  if (tail.version != kVersion) {
    refuse(file, concat("an image of version ", tail.version, "; this is a reader of version ",
                        kVersion));
  }
  if (tail.chunk_bytes != kImageChunkBytes) {
    refuse(file, concat("chunks of ", tail.chunk_bytes, " bytes, not of ", kImageChunkBytes));
  }
  if (tail.payload_bytes == 0 || tail.payload_bytes > kMaxPayloadBytes) {
    refuse(file, concat("an image of ", tail.payload_bytes, " bytes"));
  }
  if (tail.metadata_bytes > kMaxMetadataBytes) {
    refuse(file, concat("metadata of ", tail.metadata_bytes, " bytes, over the limit of ",
                        kMaxMetadataBytes));
  }
  if (tail.layout_bytes > kMaxLayoutBytes) {
    refuse(file, concat("a layout of ", tail.layout_bytes, " bytes, over the limit of ",
                        kMaxLayoutBytes));
  }
  if (tail.zeros != std::array<std::uint64_t, 3>{}) {
    refuse(file, "reserved bytes of the tail are not zero");
  }
  ImageTail result{.payload_bytes = tail.payload_bytes,
                   .metadata_bytes = tail.metadata_bytes,
                   .layout_bytes = tail.layout_bytes};
  auto expected = result.payload_bytes + result.footer_bytes();
  if (file_bytes != expected) {
    refuse(file, concat("has ", file_bytes, " bytes, but its tail speaks of ", expected,
                        file_bytes < expected ? ": torn" : ": something is added"));
  }
  return result;
}

ImageFooter parse_image_footer(ImageTail const& tail, std::span<std::byte const> footer,
                               std::string const& file) {
  if (footer.size() != tail.footer_bytes()) throw std::logic_error("a footer of another size");
  std::uint32_t expected = 0;
  auto covered = footer.size() - kUncoveredBytes;
  std::memcpy(&expected, footer.data() + covered, sizeof expected);
  if (crc32c(footer.data(), covered) != expected) {
    refuse(file, "the footer differs from its checksum: torn or altered");
  }
  auto const* at = footer.data();
  auto const* checksums = at + padding_bytes(tail.payload_bytes);
  if (std::any_of(at, checksums, [](std::byte byte) { return byte != std::byte{0}; })) {
    refuse(file, "bytes between the image and its footer are not zero");
  }
  ImageFooter result{
      .payload_bytes = tail.payload_bytes, .checksums = {}, .metadata = {}, .layout = {}};
  result.checksums.resize(num_image_chunks(tail.payload_bytes));
  auto checksum_bytes = result.checksums.size() * sizeof(std::uint32_t);
  std::memcpy(result.checksums.data(), checksums, checksum_bytes);
  auto const* text = reinterpret_cast<char const*>(checksums + checksum_bytes);
  result.metadata.assign(text, tail.metadata_bytes);
  result.layout.assign(text + tail.metadata_bytes, tail.layout_bytes);
  return result;
}

ImageFooter parse_image(std::span<std::byte const> file_bytes, std::string const& file) {
  if (file_bytes.size() < kImageTailBytes) {
    refuse(file, concat("not an image: ", file_bytes.size(), " bytes"));
  }
  auto tail = parse_image_tail(file_bytes.last<kImageTailBytes>(), file_bytes.size(), file);
  auto result = parse_image_footer(tail, file_bytes.subspan(tail.payload_bytes), file);
  std::vector<std::uint32_t> found;
  for (std::size_t offset = 0; offset < tail.payload_bytes; offset += kImageChunkBytes) {
    auto bytes = std::min(kImageChunkBytes, tail.payload_bytes - offset);
    found.push_back(crc32c(file_bytes.data() + offset, bytes));
  }
  auto bad = describe_bad_chunks(result.checksums, found, tail.payload_bytes);
  if (!bad.empty()) refuse(file, bad);
  return result;
}

std::string describe_bad_chunks(std::vector<std::uint32_t> const& expected,
                                std::vector<std::uint32_t> const& found,
                                std::size_t payload_bytes) {
  constexpr std::size_t kMostNamed = 8;
  std::string named;
  std::size_t num_bad = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == found[i]) continue;
    auto begin = i * kImageChunkBytes;
    if (++num_bad <= kMostNamed) {
      named += concat(num_bad > 1 ? ", " : "", "chunk ", i, " [", begin, ", ",
                      std::min(begin + kImageChunkBytes, payload_bytes), ")");
    }
  }
  if (num_bad == 0) return "";
  return concat(num_bad, " of ", expected.size(), " chunks differ from what was sealed: ", named,
                num_bad > kMostNamed ? ", ..." : "");
}

}  // namespace aegaeon
