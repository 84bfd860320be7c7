// What stands behind an image's bytes in a file, on disk or in shared memory. It is at the end, so
// that the bytes start on a page at offset 0 and their checksums may be known last (as in Parquet).
//
//   bytes        payload_bytes
//   zeros        up to the next multiple of 4096
//   checksums    one uint32 per chunk of 8 MiB: crc32c
//   metadata     metadata_bytes of JSON, for those who choose among images
//   layout       layout_bytes of JSON, for those who read tensors from it
//   tail         64 bytes:
//     0  uint64  payload_bytes
//     8  uint64  chunk_bytes, 8 MiB
//    16  uint32  metadata_bytes
//    20  uint32  layout_bytes
//    24  24      zeros
//    48  uint32  version, 1
//    52  uint32  crc32c of everything from the first zero to here
//    56  8       "AEGIMAGE"
//
// All little-endian. A file of a footer's contents has one form only: what parses, serialises to
// the same bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace aegaeon {

inline constexpr std::size_t kImageChunkBytes = std::size_t{8} << 20;  // of one checksum
inline constexpr std::size_t kImageTailBytes = 64;
inline constexpr std::size_t kMaxMetadataBytes = std::size_t{64} << 10;
inline constexpr std::size_t kMaxLayoutBytes = std::size_t{64} << 20;
inline constexpr std::size_t kMaxPayloadBytes = std::size_t{1} << 46;

struct ImageFooter {
  std::size_t payload_bytes = 0;
  std::vector<std::uint32_t> checksums;
  std::string metadata;
  std::string layout;

  // Everything behind the payload.
  [[nodiscard]] std::vector<std::byte> serialize() const;
};

constexpr std::size_t num_image_chunks(std::size_t payload_bytes) noexcept {
  return (payload_bytes + kImageChunkBytes - 1) / kImageChunkBytes;
}

// The sizes in a tail, found to be possible and to add up to the file's.
struct ImageTail {
  std::size_t payload_bytes = 0;
  std::size_t metadata_bytes = 0;
  std::size_t layout_bytes = 0;

  [[nodiscard]] std::size_t footer_bytes() const noexcept;  // everything behind the payload
};

// All throw IntegrityError, with what is wrong and the file's name in front.
ImageTail parse_image_tail(std::span<std::byte const, kImageTailBytes> tail, std::size_t file_bytes,
                           std::string const& file);
ImageFooter parse_image_footer(ImageTail const& tail, std::span<std::byte const> footer,
                               std::string const& file);
// Both of these, and the checksums of the payload: a whole file in memory.
ImageFooter parse_image(std::span<std::byte const> file_bytes, std::string const& file);

// "2 of 3 chunks differ from what was sealed: chunk 0 [0, 8388608), ..."; empty if none does.
std::string describe_bad_chunks(std::vector<std::uint32_t> const& expected,
                                std::vector<std::uint32_t> const& found, std::size_t payload_bytes);

}  // namespace aegaeon
