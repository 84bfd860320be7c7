// JsonReader: one pass over a JSON text of bounded depth. Whoever reads says what is expected next;
// values go straight to where they belong, and of those nobody asks for only the form is checked.
// What is accepted is exactly what Rust's serde_json accepts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace aegaeon {

// Where the first character that is not UTF-8 starts (RFC 3629); the size if all are.
std::size_t valid_utf8_bytes(std::string_view text) noexcept;

class JsonReader {
 public:
  // what: what the text is, in front of every message, with where it comes from. Both outlive it.
  JsonReader(std::string_view text, std::string const& what) : text_(text), what_(what) {}

  // Throw IntegrityError; the first says where the reader is.
  [[noreturn]] void refuse_here(std::string const& why) const;
  [[noreturn]] void refuse_json(std::string const& why) const;

  // The next character that is not space; none at the end.
  std::optional<char> peek() noexcept;
  [[nodiscard]] std::size_t at() const noexcept { return at_; }
  [[nodiscard]] std::string_view since(std::size_t begin) const noexcept {
    return text_.substr(begin, at_ - begin);
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
  // Called where '"' is next.
  std::string read_string();
  // Called where '-' or a digit is next. None: a number, but not an unsigned integer of 64 bits;
  // a minus sign or a fraction disqualify even zero. What a double cannot hold is refused, by the
  // reference's own arithmetic: a significand of 64 bits, further digits as powers of ten.
  std::optional<std::uint64_t> read_number();
  void skip_value();

 private:
  static constexpr int kMaxDepth = 127;  // of arrays and objects in each other

  bool take(char wanted) noexcept;
  bool take_next(char wanted) noexcept;
  [[nodiscard]] bool next_is_digit() const noexcept {
    return at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9';
  }
  void enter();
  void read_word(std::string_view word);
  void read_escape(std::string& text);
  std::uint32_t read_hex();
  bool read_digits(std::uint64_t& significand, std::int64_t* exponent) noexcept;
  void read_exponent(std::uint64_t significand, std::int64_t exponent);
  void require_finite(std::uint64_t significand, std::int64_t exponent) const;

  std::string_view const text_;
  std::string const& what_;
  std::size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace aegaeon
