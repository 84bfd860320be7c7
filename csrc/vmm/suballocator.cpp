#include "vmm/suballocator.hpp"

#include <iterator>
#include <limits>
#include <stdexcept>

#include "error.hpp"

namespace aegaeon {

Suballocator::Suballocator(std::size_t size_bytes) {
  if (size_bytes >= kAlignment) add_free({0, size_bytes / kAlignment * kAlignment});
}

std::size_t Suballocator::rounded(std::size_t bytes) noexcept {
  constexpr auto kLargest = std::numeric_limits<std::size_t>::max() / kAlignment * kAlignment;
  return bytes > kLargest ? kLargest : (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::optional<std::size_t> Suballocator::best_fit(std::size_t bytes) const {
  auto found = free_by_size_.lower_bound({rounded(bytes), 0});
  if (found == free_by_size_.end()) return std::nullopt;
  return found->first;
}

std::optional<Range> Suballocator::allocate(std::size_t bytes) {
  if (bytes == 0) throw std::invalid_argument("a piece of 0 bytes");
  auto wanted = rounded(bytes);
  auto found = free_by_size_.lower_bound({wanted, 0});
  if (found == free_by_size_.end()) return std::nullopt;
  auto [size, offset] = *found;
  pieces_.emplace(offset, wanted);
  remove_free(free_.find(offset));
  if (size > wanted) add_free({offset + wanted, size - wanted});
  allocated_bytes_ += wanted;
  return Range{offset, wanted};
}

Range Suballocator::free(std::size_t offset) {
  auto piece = pieces_.find(offset);
  if (piece == pieces_.end()) {
    throw std::invalid_argument(concat("no piece starts at offset ", offset));
  }
  Range whole{offset, piece->second};
  allocated_bytes_ -= whole.size_bytes;
  pieces_.erase(piece);
  auto after = free_.lower_bound(offset);
  if (after != free_.begin()) {
    auto before = std::prev(after);
    if (before->first + before->second == offset) {
      whole = {before->first, before->second + whole.size_bytes};
      remove_free(before);
    }
  }
  if (after != free_.end() && after->first == whole.offset_bytes + whole.size_bytes) {
    whole.size_bytes += after->second;
    remove_free(after);
  }
  add_free(whole);
  return whole;
}

std::vector<Range> Suballocator::free_ranges() const {
  std::vector<Range> ranges;
  for (auto [offset, size] : free_) ranges.push_back({offset, size});
  return ranges;
}

std::size_t Suballocator::largest_free_bytes() const noexcept {
  return free_by_size_.empty() ? 0 : free_by_size_.rbegin()->first;
}

void Suballocator::add_free(Range const& range) {
  free_.emplace(range.offset_bytes, range.size_bytes);
  free_by_size_.emplace(range.size_bytes, range.offset_bytes);
}

void Suballocator::remove_free(std::map<std::size_t, std::size_t>::iterator piece) {
  free_by_size_.erase({piece->second, piece->first});
  free_.erase(piece);
}

}  // namespace aegaeon
