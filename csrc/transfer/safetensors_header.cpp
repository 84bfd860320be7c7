#include "transfer/safetensors_header.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <unordered_map>
#include <utility>

#include "error.hpp"

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
constexpr int kMaxDepth = 127;  // of arrays and objects in each other

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

// Where the first character that is not UTF-8 starts (RFC 3629); the size if all are.
std::size_t valid_utf8_bytes(std::string_view text) noexcept {
  auto const* bytes = reinterpret_cast<unsigned char const*>(text.data());
  auto size = text.size();
  std::size_t at = 0;
  auto continues = [&](std::size_t i, unsigned low = 0x80, unsigned high = 0xBF) {
    return i < size && bytes[i] >= low && bytes[i] <= high;
  };
  while (at < size) {
    std::uint64_t word;
    if (size - at >= sizeof word) {  // eight characters of ASCII at a time
      std::memcpy(&word, bytes + at, sizeof word);
      if ((word & 0x8080808080808080u) == 0) {
        at += sizeof word;
        continue;
      }
    }
    unsigned lead = bytes[at];
    if (lead < 0x80) {
      at += 1;
    } else if (lead >= 0xC2 && lead <= 0xDF) {
      if (!continues(at + 1)) return at;
      at += 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {  // neither overlong nor a surrogate
      auto low = lead == 0xE0 ? 0xA0u : 0x80u;
      auto high = lead == 0xED ? 0x9Fu : 0xBFu;
      if (!continues(at + 1, low, high) || !continues(at + 2)) return at;
      at += 3;
    } else if (lead >= 0xF0 && lead <= 0xF4) {  // neither overlong nor above U+10FFFF
      auto low = lead == 0xF0 ? 0x90u : 0x80u;
      auto high = lead == 0xF4 ? 0x8Fu : 0xBFu;
      if (!continues(at + 1, low, high) || !continues(at + 2) || !continues(at + 3)) return at;
      at += 4;
    } else {
      return at;
    }
  }
  return size;
}

void append_utf8(std::string& text, std::uint32_t character) {
  auto byte = [&](std::uint32_t value) { text += static_cast<char>(value); };
  if (character < 0x80) {
    byte(character);
  } else if (character < 0x800) {
    byte(0xC0 | (character >> 6));
    byte(0x80 | (character & 0x3F));
  } else if (character < 0x10000) {
    byte(0xE0 | (character >> 12));
    byte(0x80 | ((character >> 6) & 0x3F));
    byte(0x80 | (character & 0x3F));
  } else {
    byte(0xF0 | (character >> 18));
    byte(0x80 | ((character >> 12) & 0x3F));
    byte(0x80 | ((character >> 6) & 0x3F));
    byte(0x80 | (character & 0x3F));
  }
}

// One pass over the JSON. Values go straight to where they belong; of those nobody asked for only
// the form is checked.
class Reader {
 public:
  Reader(std::string_view text, std::string const& file) : text_(text), file_(file) {}

  SafetensorsHeader read() {
    SafetensorsHeader header;
    header.header_bytes = text_.size();
    std::unordered_map<std::string, std::size_t> index;
    if (peek() != '{') refuse_here("is not a JSON object: it has to start with '{'");
    read_object([&](std::string name) {
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
    if (peek()) refuse_here("has more behind its JSON object");
    return header;
  }

 private:
  [[noreturn]] void refuse(std::string const& why) const {
    throw IntegrityError(concat(file_, ": header: ", why));
  }
  [[noreturn]] void refuse_here(std::string const& why) const {
    throw IntegrityError(concat(file_, ": header ", why, ", at byte ", at_, " of ", text_.size()));
  }
  [[noreturn]] void refuse_json(std::string const& why) const {
    refuse_here(concat("is not JSON: ", why));
  }

  // The next character that is not space; none at the end.
  std::optional<char> peek() noexcept {
    while (at_ < text_.size()) {
      auto next = text_[at_];
      if (next != ' ' && next != '\n' && next != '\t' && next != '\r') return next;
      ++at_;
    }
    return std::nullopt;
  }
  bool take(char wanted) noexcept {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }
  // The same for what follows without space between.
  bool take_next(char wanted) noexcept {
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }
  bool next_is_digit() const noexcept {
    return at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9';
  }

  // Both are called where '{' or '[' is next.
  template <typename ReadMember>
  void read_object(ReadMember read_member) {
    enter();
    if (!take('}')) {
      do {
        if (peek() != '"') refuse_json("expected a name in quotes");
        auto name = read_string();
        if (!take(':')) refuse_json("expected ':'");
        read_member(std::move(name));
      } while (take(','));
      if (!take('}')) refuse_json("expected ',' or '}'");
    }
    --depth_;
  }
  template <typename ReadElement>
  void read_array(ReadElement read_element) {
    enter();
    if (!take(']')) {
      do {
        read_element();
      } while (take(','));
      if (!take(']')) refuse_json("expected ',' or ']'");
    }
    --depth_;
  }
  void enter() {
    ++at_;
    if (++depth_ > kMaxDepth) refuse_json(concat("nested deeper than ", kMaxDepth));
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
    if (peek() == '{') {
      read_object([&](std::string const& key) {
        auto field = static_cast<std::size_t>(std::ranges::find(kFields, key) - kFields.begin());
        if (field == kFields.size()) return skip_value();
        if (seen[field]) refuse(concat("tensor ", quoted(name), " has ", key, " twice"));
        read_field(field);
      });
    } else if (peek() == '[') {
      std::size_t num_fields = 0;
      read_array([&] {
        if (num_fields == kFields.size()) {
          refuse(concat("tensor ", quoted(name), " is a list of more than three fields"));
        }
        read_field(num_fields++);
      });
    } else {
      refuse_here(concat("has something else than an object for tensor ", quoted(name)));
    }
    for (std::size_t field = 0; field < kFields.size(); ++field) {
      if (!seen[field]) refuse(concat("tensor ", quoted(name), " has no ", kFields[field]));
    }
    return tensor;
  }

  SafetensorsDtype read_dtype(std::string const& name) {
    std::string dtype;
    if (peek() == '"') {
      dtype = read_string();
    } else if (peek() == '{') {  // serde's long form of a name: {"F32": null}
      std::size_t num_members = 0;
      read_object([&](std::string key) {
        dtype = std::move(key);
        ++num_members;
        if (peek() != 'n') refuse_here(concat("has no dtype for tensor ", quoted(name)));
        skip_value();
      });
      if (num_members != 1) refuse(concat("tensor ", quoted(name), " has no single dtype"));
    } else {
      refuse_here(concat("has no text for the dtype of tensor ", quoted(name)));
    }
    auto const* found = std::ranges::find(kDtypes, dtype, &SafetensorsDtype::name);
    if (found == kDtypes.end()) {
      refuse(concat("tensor ", quoted(name), " has the unknown dtype ", quoted(dtype)));
    }
    return *found;
  }

  std::vector<std::uint64_t> read_unsigned_array(std::string const& name, char const* field) {
    if (peek() != '[') {
      refuse_here(concat("has no list for the ", field, " of tensor ", quoted(name)));
    }
    std::vector<std::uint64_t> numbers;
    read_array([&] {
      auto first = peek();
      auto begin = at_;
      std::optional<std::uint64_t> number;
      if (first && (*first == '-' || (*first >= '0' && *first <= '9'))) {
        number = read_number();
      } else {
        skip_value();
      }
      if (!number) {
        refuse(concat(field, " of tensor ", quoted(name), " has ",
                      quoted(text_.substr(begin, at_ - begin)),
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
    if (peek() == 'n') {
      skip_value();
      return std::nullopt;
    }
    if (peek() != '{') refuse_here(concat("has no object for ", quoted(kMetadataKey)));
    std::map<std::string, std::string> metadata;
    read_object([&](std::string key) {
      if (peek() != '"') {
        refuse_here(
            concat("has something else than text for ", quoted(key), " of ", quoted(kMetadataKey)));
      }
      metadata.insert_or_assign(std::move(key), read_string());
    });
    return metadata;
  }

  void skip_value() {
    auto next = peek();
    if (!next) refuse_json("it ends where a value is expected");
    switch (*next) {
      case '{':
        return read_object([&](std::string const&) { skip_value(); });
      case '[':
        return read_array([&] { skip_value(); });
      case '"':
        read_string();
        return;
      case 'n':
        return read_word("null");
      case 't':
        return read_word("true");
      case 'f':
        return read_word("false");
      default:
        if (*next != '-' && !next_is_digit()) refuse_json("expected a value");
        read_number();
    }
  }

  void read_word(std::string_view word) {
    if (!text_.substr(at_).starts_with(word)) refuse_json(concat("expected ", word));
    at_ += word.size();
  }

  // Called where '"' is next.
  std::string read_string() {
    ++at_;
    std::string text;
    for (;;) {
      auto begin = at_;
      while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\\' &&
             static_cast<unsigned char>(text_[at_]) >= 0x20) {
        ++at_;
      }
      text.append(text_, begin, at_ - begin);
      if (at_ == text_.size()) refuse_json("it ends within a text");
      auto stopped = text_[at_];
      if (stopped != '"' && stopped != '\\') refuse_json("a control character within a text");
      ++at_;
      if (stopped == '"') return text;
      read_escape(text);
    }
  }

  // Called behind '\'.
  void read_escape(std::string& text) {
    static constexpr std::string_view kEscapes = "\"\\/bfnrt";
    static constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    if (at_ == text_.size()) refuse_json("it ends within a text");
    auto kind = text_[at_++];
    if (kind != 'u') {
      auto found = kEscapes.find(kind);
      if (found == kEscapes.npos) refuse_json("an unknown escape within a text");
      text += kMeanings[found];
      return;
    }
    auto character = read_hex();
    if (character >= 0xDC00 && character <= 0xDFFF) refuse_json("half a surrogate pair");
    if (character >= 0xD800 && character <= 0xDBFF) {
      if (!take_next('\\') || !take_next('u')) refuse_json("half a surrogate pair");
      auto low = read_hex();
      if (low < 0xDC00 || low > 0xDFFF) refuse_json("half a surrogate pair");
      character = 0x10000 + ((character - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(text, character);
  }

  std::uint32_t read_hex() {
    std::uint32_t value = 0;
    auto digits = text_.substr(at_, 4);
    auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) {
      refuse_json("expected four hexadecimal digits");
    }
    at_ += 4;
    return value;
  }

  // Called where '-' or a digit is next. None: a number, but not an unsigned integer of 64 bits;
  // a minus sign or a fraction disqualify even zero. What a double cannot hold is refused, by the
  // reference's own arithmetic: a significand of 64 bits, further digits as powers of ten.
  std::optional<std::uint64_t> read_number() {
    bool negative = take_next('-');
    if (!next_is_digit()) refuse_json("expected a digit");
    auto begin = at_;
    std::uint64_t significand = 0;
    std::int64_t exponent = 0;
    bool full = read_digits(significand, nullptr);
    if (text_[begin] == '0' && at_ > begin + 1) refuse_json("a number with a leading zero");
    if (full) {  // digits that no longer fit
      for (; next_is_digit(); ++at_) ++exponent;
    }
    bool is_integer = !negative && !full;
    if (take_next('.')) {
      is_integer = false;
      if (!next_is_digit()) refuse_json("expected a digit");
      if (read_digits(significand, &exponent)) {
        while (next_is_digit()) ++at_;
      }
    }
    if (take_next('e') || take_next('E')) {
      is_integer = false;
      read_exponent(significand, exponent);
    } else {
      require_finite(significand, exponent);
    }
    if (!is_integer) return std::nullopt;
    return significand;
  }

  // Appends digits to the significand, of which those behind the point lower the exponent. True: it
  // would overflow, and digits are left.
  bool read_digits(std::uint64_t& significand, std::int64_t* exponent) noexcept {
    for (; next_is_digit(); ++at_) {
      auto grown = significand;
      auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
      if (!multiply(grown, 10) || __builtin_add_overflow(grown, digit, &grown)) return true;
      significand = grown;
      if (exponent) --*exponent;
    }
    return false;
  }

  void read_exponent(std::uint64_t significand, std::int64_t exponent) {
    bool negative = take_next('-');
    if (!negative) take_next('+');
    if (!next_is_digit()) refuse_json("expected a digit");
    std::int64_t written = 0;
    for (; next_is_digit(); ++at_) {
      constexpr std::int64_t kEnough = std::numeric_limits<std::int32_t>::max();
      written = std::min(written * 10 + (text_[at_] - '0'), kEnough);
    }
    require_finite(significand, negative ? exponent - written : exponent + written);
  }

  void require_finite(std::uint64_t significand, std::int64_t exponent) const {
    // Below that the largest significand stays below the largest double.
    constexpr std::int64_t kHarmless = 288;
    constexpr std::int64_t kLargest = 308;
    if (significand == 0 || exponent <= kHarmless) return;
    double power = 0;
    if (exponent <= kLargest) {
      auto text = concat("1e", exponent);
      std::from_chars(text.data(), text.data() + text.size(), power);
      if (std::isfinite(static_cast<double>(significand) * power)) return;
    }
    refuse_json("a number out of range");
  }

  std::string_view const text_;
  std::string const& file_;
  std::size_t at_ = 0;
  int depth_ = 0;
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
  auto header = Reader(json, file).read();
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
