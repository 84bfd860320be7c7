// FreeList: which parts of a range are free. Best fit; neighbours merge. Knows offsets, not memory.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace aegaeon {

class FreeList {
 public:
  // Both multiples of alignment_bytes: the range, and, rounded up, all that is taken from it.
  FreeList(std::size_t size_bytes, std::size_t alignment_bytes);

  // From the smallest free part that is large enough, the first of several; nothing without one.
  std::optional<std::size_t> take(std::size_t bytes);
  // What take() gave, with the bytes it was asked for.
  void give_back(std::size_t offset, std::size_t bytes);

  [[nodiscard]] std::size_t rounded(std::size_t bytes) const noexcept;
  [[nodiscard]] std::size_t free_bytes() const noexcept { return free_bytes_; }
  [[nodiscard]] std::size_t largest_bytes() const noexcept;
  [[nodiscard]] std::size_t num_parts() const noexcept { return by_offset_.size(); }

 private:
  using Parts = std::map<std::size_t, std::size_t>;  // offset: bytes
  void add(std::size_t offset, std::size_t bytes);
  void remove(Parts::iterator part);

  std::size_t const alignment_bytes_;
  std::size_t free_bytes_ = 0;
  Parts by_offset_;
  std::set<std::pair<std::size_t, std::size_t>> by_size_;  // (bytes, offset)
};

}  // namespace aegaeon
