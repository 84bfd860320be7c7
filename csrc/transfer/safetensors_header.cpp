#include "transfer/safetensors_header.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "error.hpp"
#include "transfer/json_reader.hpp"

namespace aegaeon {
namespace {

static_assert(std::endian::native == std::endian::little, "the length is copied as it is");

constexpr std::array kDtypes = std::to_array<SafetensorsDtype>({
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
});
constexpr std::string_view kMetadataKey = "__metadata__";

// As it may stand in a message: short, in quotes, without control characters.
std::string quoted(std::string_view text) {
  constexpr std::size_t kMaxShown = 80;
  static constexpr char kHex[] = "0123456789abcdef";
  std::string shown = "'";
  std::size_t at = 0;
  for (; at < text.size(); ++at) {
    auto byte = static_cast<unsigned char>(text[at]);
    bool starts_character = (byte & 0xC0) != 0x80;
    if (at >= kMaxShown && starts_character) break;
    if (byte >= 0x20 && byte != 0x7F) {
      shown += text[at];
    } else {
      shown += "\\x";
      shown += kHex[byte >> 4];
      shown += kHex[byte & 15];
    }
  }
  shown += at < text.size() ? "...'" : "'";
  return shown;
}

std::string list(std::vector<std::uint64_t> const& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size() && i < 16; ++i) {
    text += concat(i > 0 ? ", " : "", shape[i]);
  }
  return text + (shape.size() > 16 ? ", ...]" : "]");
}

bool multiply(std::uint64_t& product, std::uint64_t factor) noexcept {
  return !__builtin_mul_overflow(product, factor, &product);
}

class HeaderReader {
 public:
  HeaderReader(std::string_view text, std::string const& file)
      : what_(concat(file, ": header")), header_bytes_(text.size()), json_(text, what_) {}

  SafetensorsHeader read() {
    SafetensorsHeader header;
    header.header_bytes = header_bytes_;
    std::unordered_map<std::string, std::size_t> index;
    if (json_.peek() != '{') json_.refuse_here("is not a JSON object: it has to start with '{'");
    json_.read_object([&](std::string name) {
      if (name == kMetadataKey) {
        if (has_metadata_) refuse(concat(quoted(name), " occurs twice"));
        has_metadata_ = true;
        header.metadata = read_metadata();
        return;
      }
      auto tensor = read_tensor(name);
      auto [found, is_new] = index.try_emplace(std::move(name), header.tensors.size());
      if (is_new) {
        header.tensors.push_back(std::move(tensor));
      } else {
        header.tensors[found->second] = std::move(tensor);
      }
    });
    if (json_.peek()) json_.refuse_here("has more behind its JSON object");
    return header;
  }

 private:
  [[noreturn]] void refuse(std::string const& why) const {
    throw IntegrityError(concat(what_, ": ", why));
  }

  SafetensorsTensor read_tensor(std::string const& name) {
    SafetensorsTensor tensor;
    tensor.name = name;
    std::array<bool, 3> seen{};
    auto read_field = [&](std::size_t field) {
      if (field == 0) tensor.dtype = read_dtype(name);
      if (field == 1) tensor.shape = read_unsigned_array(name, "shape");
      if (field == 2) std::tie(tensor.begin, tensor.end) = read_offsets(name);
      seen[field] = true;
    };
    static constexpr std::array<std::string_view, 3> kFields{"dtype", "shape", "data_offsets"};
    if (json_.peek() == '{') {
      json_.read_object([&](std::string const& key) {
        auto field = static_cast<std::size_t>(std::ranges::find(kFields, key) - kFields.begin());
        if (field == kFields.size()) return json_.skip_value();
        if (seen[field]) refuse(concat("tensor ", quoted(name), " has ", key, " twice"));
        read_field(field);
      });
    } else if (json_.peek() == '[') {
      std::size_t num_fields = 0;
      json_.read_array([&] {
        if (num_fields == kFields.size()) {
          refuse(concat("tensor ", quoted(name), " is a list of more than three fields"));
        }
        read_field(num_fields++);
      });
    } else {
      json_.refuse_here(concat("has something else than an object for tensor ", quoted(name)));
    }
    for (std::size_t field = 0; field < kFields.size(); ++field) {
      if (!seen[field]) refuse(concat("tensor ", quoted(name), " has no ", kFields[field]));
    }
    return tensor;
  }

  SafetensorsDtype read_dtype(std::string const& name) {
    std::string dtype;
    if (json_.peek() == '"') {
      dtype = json_.read_string();
    } else if (json_.peek() == '{') {  // serde's long form of a name: {"F32": null}
      std::size_t num_members = 0;
      json_.read_object([&](std::string key) {
        dtype = std::move(key);
        ++num_members;
        if (json_.peek() != 'n') {
          json_.refuse_here(concat("has no dtype for tensor ", quoted(name)));
        }
        json_.skip_value();
      });
      if (num_members != 1) refuse(concat("tensor ", quoted(name), " has no single dtype"));
    } else {
      json_.refuse_here(concat("has no text for the dtype of tensor ", quoted(name)));
    }
    auto const* found = std::ranges::find(kDtypes, dtype, &SafetensorsDtype::name);
    if (found == kDtypes.end()) {
      refuse(concat("tensor ", quoted(name), " has the unknown dtype ", quoted(dtype)));
    }
    return *found;
  }

  std::vector<std::uint64_t> read_unsigned_array(std::string const& name, char const* field) {
    if (json_.peek() != '[') {
      json_.refuse_here(concat("has no list for the ", field, " of tensor ", quoted(name)));
    }
    std::vector<std::uint64_t> numbers;
    json_.read_array([&] {
      auto first = json_.peek();
      auto begin = json_.at();
      std::optional<std::uint64_t> number;
      if (first && (*first == '-' || (*first >= '0' && *first <= '9'))) {
        number = json_.read_number();
      } else {
        json_.skip_value();
      }
      if (!number) {
        refuse(concat(field, " of tensor ", quoted(name), " has ", quoted(json_.since(begin)),
                      ", which is not an unsigned integer of 64 bits"));
      }
      numbers.push_back(*number);
    });
    return numbers;
  }

  std::pair<std::uint64_t, std::uint64_t> read_offsets(std::string const& name) {
    auto offsets = read_unsigned_array(name, "data_offsets");
    if (offsets.size() != 2) {
      refuse(concat("data_offsets of tensor ", quoted(name), " are ", list(offsets), ", not two"));
    }
    return {offsets[0], offsets[1]};
  }

  std::optional<std::map<std::string, std::string>> read_metadata() {
    if (json_.peek() == 'n') {
      json_.skip_value();
      return std::nullopt;
    }
    if (json_.peek() != '{') json_.refuse_here(concat("has no object for ", quoted(kMetadataKey)));
    std::map<std::string, std::string> metadata;
    json_.read_object([&](std::string key) {
      if (json_.peek() != '"') {
        json_.refuse_here(
            concat("has something else than text for ", quoted(key), " of ", quoted(kMetadataKey)));
      }
      metadata.insert_or_assign(std::move(key), json_.read_string());
    });
    return metadata;
  }

  std::string const what_;
  std::size_t const header_bytes_;
  JsonReader json_;
  bool has_metadata_ = false;
};

[[noreturn]] void refuse_tensor(std::string const& file, SafetensorsTensor const& tensor,
                                std::string const& why) {
  throw IntegrityError(concat(file, ": header: tensor ", quoted(tensor.name), " ", why));
}

std::uint64_t size_of(SafetensorsTensor const& tensor, std::string const& file) {
  std::uint64_t num_bits = 1;
  bool fits = std::ranges::all_of(tensor.shape, [&](auto dim) { return multiply(num_bits, dim); });
  if (!fits || !multiply(num_bits, tensor.dtype.num_bits)) {
    refuse_tensor(file, tensor,
                  concat("of shape ", list(tensor.shape), " has more bits than 64 bits count"));
  }
  if (num_bits % 8 != 0) {
    refuse_tensor(file, tensor,
                  concat("of ", tensor.dtype.name, " and shape ", list(tensor.shape),
                         " does not end on a byte"));
  }
  return num_bits / 8;
}

// The tensors lie one behind the other, each of the size that its shape says.
void require_contiguous(std::vector<SafetensorsTensor> const& tensors, std::uint64_t data_bytes,
                        std::string const& file) {
  std::uint64_t end = 0;
  for (auto const& tensor : tensors) {
    auto place = concat("at [", tensor.begin, ", ", tensor.end, ")");
    if (tensor.begin > end) {
      refuse_tensor(file, tensor, concat(place, " leaves a hole from ", end, " on"));
    }
    if (tensor.begin < end) {
      refuse_tensor(file, tensor,
                    concat(place, " overlaps the one in front of it, which ends at ", end));
    }
    if (tensor.end < tensor.begin) {
      refuse_tensor(file, tensor, concat(place, " ends before it starts"));
    }
    auto size = size_of(tensor, file);
    if (tensor.end - tensor.begin != size) {
      refuse_tensor(file, tensor,
                    concat(place, " should have ", size, " bytes, being ", tensor.dtype.name,
                           " of shape ", list(tensor.shape)));
    }
    end = tensor.end;
  }
  if (end != data_bytes) {
    throw IntegrityError(concat(file, ": the tensors end at byte ", end, " of the data, which has ",
                                data_bytes, " bytes"));
  }
}

}  // namespace

std::span<SafetensorsDtype const> safetensors_dtypes() noexcept {
  return kDtypes;
}

std::size_t parse_safetensors_length(std::span<std::byte const, kSafetensorsLengthBytes> bytes,
                                     std::uint64_t file_bytes, std::string const& file) {
  std::uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  if (header_bytes > kMaxSafetensorsHeaderBytes) {
    throw IntegrityError(concat(file, ": header of ", header_bytes, " bytes, over the limit of ",
                                kMaxSafetensorsHeaderBytes, "; not a safetensors file?"));
  }
  if (header_bytes > file_bytes - kSafetensorsLengthBytes) {
    throw IntegrityError(concat(file, ": header of ", header_bytes, " bytes in a file of ",
                                file_bytes, "; truncated?"));
  }
  return header_bytes;
}

SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t data_bytes,
                                           std::string const& file) {
  auto valid = valid_utf8_bytes(json);
  if (valid != json.size()) {
    throw IntegrityError(
        concat(file, ": header is not UTF-8, at byte ", valid, " of ", json.size()));
  }
  auto header = HeaderReader(json, file).read();
  std::ranges::stable_sort(header.tensors, {}, [](SafetensorsTensor const& tensor) {
    return std::pair(tensor.begin, tensor.end);
  });
  require_contiguous(header.tensors, data_bytes, file);
  return header;
}

SafetensorsHeader parse_safetensors(std::span<std::byte const> file_bytes,
                                    std::string const& file) {
  if (file_bytes.size() < kSafetensorsLengthBytes) {
    throw IntegrityError(concat(file, ": not a safetensors file: ", file_bytes.size(), " bytes"));
  }
  auto header_bytes = parse_safetensors_length(file_bytes.first<kSafetensorsLengthBytes>(),
                                               file_bytes.size(), file);
  auto json = file_bytes.subspan(kSafetensorsLengthBytes, header_bytes);
  return parse_safetensors_header({reinterpret_cast<char const*>(json.data()), json.size()},
                                  file_bytes.size() - kSafetensorsLengthBytes - header_bytes, file);
}

}  // namespace aegaeon
