#include "transfer/free_list.hpp"

#include <iterator>
#include <limits>

namespace aegaeon {

FreeList::FreeList(std::size_t size_bytes, std::size_t alignment_bytes)
    : alignment_bytes_(alignment_bytes) {
  add(0, size_bytes);
}

std::optional<std::size_t> FreeList::take(std::size_t bytes) {
  bytes = rounded(bytes);
  auto found = by_size_.lower_bound({bytes, 0});
  if (found == by_size_.end()) return std::nullopt;
  auto [part_bytes, offset] = *found;
  if (part_bytes > bytes) add(offset + bytes, part_bytes - bytes);
  remove(by_offset_.find(offset));
  return offset;
}

void FreeList::give_back(std::size_t offset, std::size_t bytes) {
  bytes = rounded(bytes);
  auto next = by_offset_.lower_bound(offset);
  if (next != by_offset_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      bytes += previous->second;
      remove(previous);
    }
  }
  if (next != by_offset_.end() && offset + bytes == next->first) {
    bytes += next->second;
    remove(next);
  }
  add(offset, bytes);
}

std::size_t FreeList::rounded(std::size_t bytes) const noexcept {
  if (bytes > std::numeric_limits<std::size_t>::max() - alignment_bytes_) return bytes;
  return (bytes + alignment_bytes_ - 1) / alignment_bytes_ * alignment_bytes_;
}

std::size_t FreeList::largest_bytes() const noexcept {
  return by_size_.empty() ? 0 : by_size_.rbegin()->first;
}

void FreeList::add(std::size_t offset, std::size_t bytes) {
  by_offset_.emplace(offset, bytes);
  by_size_.emplace(bytes, offset);
  free_bytes_ += bytes;
}

void FreeList::remove(Parts::iterator part) {
  free_bytes_ -= part->second;
  by_size_.erase({part->second, part->first});
  by_offset_.erase(part);
}

}  // namespace aegaeon
