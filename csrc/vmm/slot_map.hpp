// SlotMap: which parts of a region are mapped, as slots: the units in which memory comes and goes.
// A slot is one handle of its size, or a run of small ones; where an unmap may cut does not depend
// on which.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <vector>

namespace aegaeon {

struct Range {
  std::size_t offset_bytes = 0;
  std::size_t size_bytes = 0;
  [[nodiscard]] std::size_t end() const noexcept { return offset_bytes + size_bytes; }
};

class SlotMap {
 public:
  // Slots may not overlap; erase() takes those that begin in the range.
  void add(Range const& slot) { slots_.emplace(slot.offset_bytes, slot.size_bytes); }
  void erase(Range const& range);

  [[nodiscard]] bool covers(Range const& range) const;
  [[nodiscard]] std::optional<Range> first_overlap(Range const& range) const;
  // The slot that the offset is inside of, not at its edge.
  [[nodiscard]] std::optional<Range> cut_by(std::size_t offset) const;
  [[nodiscard]] std::vector<Range> slots_in(Range const& range) const;
  [[nodiscard]] std::vector<Range> runs_in(Range const& range) const;  // neighbours joined

 private:
  std::map<std::size_t, std::size_t> slots_;  // begin: bytes
};

}  // namespace aegaeon
