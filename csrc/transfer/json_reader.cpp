#include "transfer/json_reader.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>

#include "error.hpp"

namespace aegaeon {
namespace {

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

}  // namespace

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

void JsonReader::refuse_here(std::string const& why) const {
  throw IntegrityError(concat(what_, " ", why, ", at byte ", at_, " of ", text_.size()));
}

void JsonReader::refuse_json(std::string const& why) const {
  refuse_here(concat("is not JSON: ", why));
}

std::optional<char> JsonReader::peek() noexcept {
  while (at_ < text_.size()) {
    auto next = text_[at_];
    if (next != ' ' && next != '\n' && next != '\t' && next != '\r') return next;
    ++at_;
  }
  return std::nullopt;
}

bool JsonReader::take(char wanted) noexcept {
  if (peek() != wanted) return false;
  ++at_;
  return true;
}

// The same for what follows without space between.
bool JsonReader::take_next(char wanted) noexcept {
  if (at_ >= text_.size() || text_[at_] != wanted) return false;
  ++at_;
  return true;
}

void JsonReader::enter() {
  ++at_;
  if (++depth_ > kMaxDepth) refuse_json(concat("nested deeper than ", kMaxDepth));
}

void JsonReader::skip_value() {
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

void JsonReader::read_word(std::string_view word) {
  if (!text_.substr(at_).starts_with(word)) refuse_json(concat("expected ", word));
  at_ += word.size();
}

std::string JsonReader::read_string() {
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
void JsonReader::read_escape(std::string& text) {
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

std::uint32_t JsonReader::read_hex() {
  std::uint32_t value = 0;
  auto digits = text_.substr(at_, 4);
  auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) {
    refuse_json("expected four hexadecimal digits");
  }
  at_ += 4;
  return value;
}

std::optional<std::uint64_t> JsonReader::read_number() {
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
bool JsonReader::read_digits(std::uint64_t& significand, std::int64_t* exponent) noexcept {
  for (; next_is_digit(); ++at_) {
    auto grown = significand;
    auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
    if (__builtin_mul_overflow(grown, std::uint64_t{10}, &grown) ||
        __builtin_add_overflow(grown, digit, &grown)) {
      return true;
    }
    significand = grown;
    if (exponent) --*exponent;
  }
  return false;
}

void JsonReader::read_exponent(std::uint64_t significand, std::int64_t exponent) {
  bool negative = take_next('-');
  if (!negative) take_next('+');
  if (!next_is_digit()) refuse_json("expected a digit");
  std::int64_t written = 0;
  for (; next_is_digit(); ++at_) {
    constexpr std::int64_t kEnough = std::numeric_limits<std::int32_t>::max();
    written = std::min(written * 10 + (text_[at_] - '0'), kEnough);
  }
  JsonReader::require_finite(significand, negative ? exponent - written : exponent + written);
}

void JsonReader::require_finite(std::uint64_t significand, std::int64_t exponent) const {
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

}  // namespace aegaeon
