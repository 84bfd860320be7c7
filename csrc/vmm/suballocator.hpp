// Suballocator: pieces of a run of bytes, best fit; freed neighbours become one piece again. Pure
// bookkeeping: it touches no memory and calls no driver. Not thread-safe.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "vmm/arena.hpp"

namespace aegaeon {

class Suballocator {
 public:
  static constexpr std::size_t kAlignment = 512;  // of every piece, as torch expects of cudaMalloc

  explicit Suballocator(std::size_t size_bytes);  // rounded down to the alignment

  // What a piece of so many bytes takes.
  static std::size_t rounded(std::size_t bytes) noexcept;
  // Size of the free piece that allocate() would cut; none: nothing fits.
  [[nodiscard]] std::optional<std::size_t> best_fit(std::size_t bytes) const;
  // From the low end of the smallest free piece that fits, the lowest of equals. Rounds up.
  std::optional<Range> allocate(std::size_t bytes);
  // The free piece that it is part of now. Throws std::invalid_argument: no piece starts there.
  Range free(std::size_t offset);

  [[nodiscard]] std::size_t allocated_bytes() const noexcept { return allocated_bytes_; }
  [[nodiscard]] std::size_t num_pieces() const noexcept { return pieces_.size(); }
  [[nodiscard]] std::vector<Range> free_ranges() const;
  [[nodiscard]] std::size_t largest_free_bytes() const noexcept;

 private:
  void add_free(Range const& range);
  void remove_free(std::map<std::size_t, std::size_t>::iterator piece);

  std::map<std::size_t, std::size_t> pieces_;  // offset: size
  std::map<std::size_t, std::size_t> free_;
  std::set<std::pair<std::size_t, std::size_t>> free_by_size_;  // (size, offset)
  std::size_t allocated_bytes_ = 0;
};

}  // namespace aegaeon
