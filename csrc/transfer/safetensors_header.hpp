// The header of a safetensors file: which tensors there are, and where. It comes from files that
// anybody may have written, so nothing is believed before it is checked.
//
//   8 bytes      header_bytes, little-endian, at most 100 MB
//   header       header_bytes of JSON: {"name": {"dtype", "shape", "data_offsets"}, ...}, and
//                "__metadata__": {"key": "text", ...}
//   data         the tensors, one behind the other, without holes
//
// What is accepted is exactly what the reference implementation accepts, the Rust crate safetensors
// 0.8 with its JSON reader, also where the format's description is narrower or silent: space around
// the JSON; a tensor as a list of its three fields; unknown fields, nested up to 127 deep; a name
// that occurs twice, of which the last counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace aegaeon {

inline constexpr std::size_t kSafetensorsLengthBytes = 8;
inline constexpr std::size_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct SafetensorsDtype {
  std::string_view name;
  std::uint64_t num_bits = 0;  // of one element
};
std::span<SafetensorsDtype const> safetensors_dtypes() noexcept;

struct SafetensorsTensor {
  std::string name;
  SafetensorsDtype dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  // in the data
  std::uint64_t end = 0;
};

struct SafetensorsHeader {
  std::size_t header_bytes = 0;
  std::vector<SafetensorsTensor> tensors;  // in the order of their bytes
  std::optional<std::map<std::string, std::string>> metadata;

  [[nodiscard]] std::uint64_t data_offset() const noexcept {
    return kSafetensorsLengthBytes + header_bytes;
  }
};

// All throw IntegrityError, with what is wrong and the file's name in front.
//
// The length of the header, found to be possible in a file of that size.
std::size_t parse_safetensors_length(std::span<std::byte const, kSafetensorsLengthBytes> bytes,
                                     std::uint64_t file_bytes, std::string const& file);
// data_bytes: of what stands behind the header; the tensors have to cover it.
SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t data_bytes,
                                           std::string const& file);
// Both of these: a whole file in memory.
SafetensorsHeader parse_safetensors(std::span<std::byte const> file_bytes, std::string const& file);

}  // namespace aegaeon
