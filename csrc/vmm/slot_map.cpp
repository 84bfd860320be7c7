#include "vmm/slot_map.hpp"

#include <iterator>

namespace aegaeon {

void SlotMap::erase(Range const& range) {
  slots_.erase(slots_.lower_bound(range.offset_bytes), slots_.lower_bound(range.end()));
}

bool SlotMap::covers(Range const& range) const {
  auto it = slots_.upper_bound(range.offset_bytes);
  if (it == slots_.begin()) return false;
  --it;
  auto reached = it->first;
  for (; it != slots_.end() && it->first == reached; ++it) {
    reached += it->second;
    if (reached <= range.offset_bytes) return false;
    if (reached >= range.end()) return true;
  }
  return false;
}

std::optional<Range> SlotMap::first_overlap(Range const& range) const {
  if (auto before = cut_by(range.offset_bytes)) return before;
  auto it = slots_.lower_bound(range.offset_bytes);
  if (it == slots_.end() || it->first >= range.end()) return std::nullopt;
  return Range{it->first, it->second};
}

std::optional<Range> SlotMap::cut_by(std::size_t offset) const {
  auto it = slots_.lower_bound(offset);
  if (it == slots_.begin()) return std::nullopt;
  --it;
  if (it->first + it->second <= offset) return std::nullopt;
  return Range{it->first, it->second};
}

std::vector<Range> SlotMap::slots_in(Range const& range) const {
  std::vector<Range> slots;
  auto end = slots_.lower_bound(range.end());
  for (auto it = slots_.lower_bound(range.offset_bytes); it != end; ++it) {
    slots.push_back({it->first, it->second});
  }
  return slots;
}

std::vector<Range> SlotMap::runs_in(Range const& range) const {
  std::vector<Range> runs;
  for (auto const& slot : slots_in(range)) {
    if (!runs.empty() && runs.back().end() == slot.offset_bytes) {
      runs.back().size_bytes += slot.size_bytes;
    } else {
      runs.push_back(slot);
    }
  }
  return runs;
}

}  // namespace aegaeon
