// Region: the operations that change what is behind an address range, each with its way back.
#include <algorithm>
#include <bit>
#include <utility>

#include "error.hpp"
#include "vmm/arena.hpp"

namespace aegaeon {

Region::Region(std::shared_ptr<Arena> arena, std::uint64_t id, std::size_t size_bytes,
               std::string owner, std::string tag)
    : arena_(std::move(arena)),
      id_(id),
      owner_(std::move(owner)),
      tag_(std::move(tag)),
      range_(std::make_shared<Reservation>(
          arena_->driver_, size_bytes,
          // Aligned like the handles, so that the driver can use its largest pages.
          std::has_single_bit(arena_->handle_bytes_) ? arena_->handle_bytes_
                                                     : arena_->driver_->granularity_bytes())) {}

Region::~Region() {
  std::lock_guard lock(arena_->mutex_);
  if (!closed_) {
    auto runs = extract_runs({0, size_bytes()});
    for (auto& run : runs) {
      Result result = unmap_run(*arena_->driver_, run);
      report(result, "mem_unmap");
      if (result == kSuccess) {
        give_back(run);
      } else {
        quarantine(run);
      }
    }
    arena_->regions_.erase(id_);
  }
  static_cast<void>(heal());
  for (auto& [offset, mapping] : quarantined_) arena_->lost_.push_back(std::move(mapping));
}

void Region::map(std::size_t offset_bytes, std::optional<std::size_t> size_bytes) {
  std::lock_guard lock(arena_->mutex_);
  require_open("map");
  auto range = checked_range("map", offset_bytes, size_bytes);
  require_free_slots(range);
  arena_->admit(*this, range.size_bytes);
  auto fresh = map_slots(slots_for(range));
  arena_->charge(*this, range.size_bytes);
  mapped_bytes_ += range.size_bytes;
  mapped_.merge(fresh);
  ++generation_;
}

void Region::unmap(std::size_t offset_bytes, std::optional<std::size_t> size_bytes) {
  std::lock_guard lock(arena_->mutex_);
  require_open("unmap");
  auto range = checked_range("unmap", offset_bytes, size_bytes);
  require_unused("unmap");
  static_cast<void>(heal());
  if (size_bytes) {
    require_whole_handles(range);
  } else {
    require_whole_handles({range.offset_bytes, 0});
    if (mapped_.lower_bound(range.offset_bytes) == mapped_.end()) {
      throw LifecycleError(
          concat("unmap of ", title(), ": nothing is mapped from offset ", offset_bytes, " on"));
    }
  }
  auto runs = extract_runs(range);
  Result result = unmap_runs(runs);
  if (result != kSuccess) {
    put_back(runs);
    check(*arena_->driver_, result, "mem_unmap", range.size_bytes);
  }
  for (auto& run : runs) give_back(run);
  ++generation_;
}

void Region::close() {
  std::lock_guard lock(arena_->mutex_);
  if (closed_) return;
  require_unused("close");
  if (Result result = heal(); result != kSuccess) {
    check(*arena_->driver_, result, "mem_unmap");
  }
  auto runs = extract_runs({0, size_bytes()});
  Result result = unmap_runs(runs);
  char const* call = "mem_unmap";
  if (result == kSuccess && num_exports_ == 0) {
    result = range_->free();
    call = "address_free";
  }
  if (result != kSuccess) {
    put_back(runs);
    check(*arena_->driver_, result, call, size_bytes());
  }
  for (auto& run : runs) give_back(run);
  arena_->regions_.erase(id_);
  closed_ = true;
}

std::vector<Range> Region::mapped_ranges() const {
  std::lock_guard lock(arena_->mutex_);
  std::vector<Range> ranges;
  for (auto const& [offset, mapping] : mapped_) {
    if (!ranges.empty() && ranges.back().offset_bytes + ranges.back().size_bytes == offset) {
      ranges.back().size_bytes += mapping.bytes();
    } else {
      ranges.push_back({offset, mapping.bytes()});
    }
  }
  return ranges;
}

std::unique_ptr<Region::Use> Region::use(std::vector<Range> const& ranges) {
  std::lock_guard lock(arena_->mutex_);
  require_open("transfer");
  for (auto const& range : ranges) {
    if (!covers(range)) {
      throw LifecycleError(concat("transfer on ", title(), ": [", range.offset_bytes, ", ",
                                  range.offset_bytes + range.size_bytes, ") is not mapped"));
    }
  }
  return std::make_unique<Use>(shared_from_this());
}

std::unique_ptr<Region::Export> Region::export_range(Range const& range) {
  std::lock_guard lock(arena_->mutex_);
  require_open("tensor");
  if (!covers(range)) {
    throw LifecycleError(concat("tensor over ", title(), ": [", range.offset_bytes, ", ",
                                range.offset_bytes + range.size_bytes, ") is not mapped"));
  }
  return std::make_unique<Export>(shared_from_this());
}

std::string Region::title() const {
  return concat("'", owner_, "' (", tag_, ")");
}

void Region::require_open(char const* verb) const {
  if (closed_) throw LifecycleError(concat(verb, " on ", title(), ": the region is closed"));
}

void Region::require_unused(char const* verb) const {
  if (num_uses_ != 0) {
    throw LifecycleError(concat(verb, " of ", title(), ": ", num_uses_.load(),
                                " transfer(s) on it are in flight; wait for them first"));
  }
}

bool Region::covers(Range const& range) const {
  auto end = range.offset_bytes + range.size_bytes;
  auto it = mapped_.upper_bound(range.offset_bytes);
  if (it == mapped_.begin()) return false;
  --it;
  auto reached = it->first;
  for (; it != mapped_.end() && it->first == reached; ++it) {
    reached += it->second.bytes();
    if (reached <= range.offset_bytes) return false;
    if (reached >= end) return true;
  }
  return false;
}

Range Region::checked_range(char const* verb, std::size_t offset_bytes,
                            std::optional<std::size_t> size_bytes) const {
  auto granularity = arena_->driver_->granularity_bytes();
  auto total = this->size_bytes();
  if (offset_bytes % granularity != 0 || (size_bytes && *size_bytes % granularity != 0)) {
    throw std::invalid_argument(
        concat(verb, " of ", title(), ": offset_bytes=", offset_bytes,
               " and size_bytes=", size_bytes ? std::to_string(*size_bytes) : "None",
               " have to be multiples of the granularity, ", granularity, " bytes"));
  }
  bool inside = offset_bytes < total &&
                (!size_bytes || (*size_bytes > 0 && *size_bytes <= total - offset_bytes));
  if (!inside) {
    throw std::invalid_argument(
        concat(verb, " of ", title(), ": offset_bytes=", offset_bytes,
               " size_bytes=", size_bytes ? std::to_string(*size_bytes) : "None",
               " is empty or outside the region of ", total, " bytes"));
  }
  return {offset_bytes, size_bytes.value_or(total - offset_bytes)};
}

void Region::require_free_slots(Range const& range) {
  Result healed = heal();
  auto end = range.offset_bytes + range.size_bytes;
  auto overlap = [&](Slots const& slots) {
    auto it = slots.lower_bound(range.offset_bytes);
    if (it != slots.begin()) {
      auto before = std::prev(it);
      if (before->first + before->second.bytes() > range.offset_bytes) it = before;
    }
    return it != slots.end() && it->first < end ? it : slots.end();
  };
  if (overlap(quarantined_) != quarantined_.end()) {
    check(*arena_->driver_, healed, "mem_unmap", range.size_bytes);
  }
  if (auto taken = overlap(mapped_); taken != mapped_.end()) {
    throw LifecycleError(concat("map of ", title(), ": [", taken->first, ", ",
                                taken->first + taken->second.bytes(), ") is mapped already"));
  }
}

// Large handles sit at multiples of their size, so every such multiple is a place to cut at;
// heads and tails are handles of the granularity.
std::vector<Range> Region::slots_for(Range const& range) const {
  auto large = arena_->handle_bytes_;
  auto small = arena_->driver_->granularity_bytes();
  auto end = range.offset_bytes + range.size_bytes;
  std::vector<Range> slots;
  for (auto offset = range.offset_bytes; offset < end;) {
    auto bytes = offset % large == 0 && end - offset >= large ? large : small;
    slots.push_back({offset, bytes});
    offset += bytes;
  }
  return slots;
}

Slots Region::map_slots(std::vector<Range> const& slots) {
  auto& driver = arena_->driver_;
  auto& pool = arena_->pool_;
  // Memory first: what is short shows before any address has changed.
  std::vector<std::shared_ptr<Allocation>> taken;
  taken.reserve(slots.size());
  Slots fresh;
  try {
    for (auto const& slot : slots) {
      taken.push_back(pool.take(slot.size_bytes, {id_, slot.offset_bytes}));
    }
    for (std::size_t i = 0; i < slots.size(); ++i) {
      fresh.try_emplace(slots[i].offset_bytes, driver, range_, slots[i].offset_bytes, taken[i]);
      taken[i].reset();
    }
    check(*driver, set_run_access(*driver, fresh), "mem_set_access",
          slots.back().offset_bytes + slots.back().size_bytes - slots.front().offset_bytes);
  } catch (...) {
    for (std::size_t i = 0; i < taken.size(); ++i) {
      if (taken[i]) pool.give(std::move(taken[i]), {id_, slots[i].offset_bytes});
    }
    if (!fresh.empty()) {
      if (unmap_run(*driver, fresh) == kSuccess) {
        for (auto& [offset, mapping] : fresh) pool.give(mapping.memory(), {id_, offset});
      } else {
        for (auto& [offset, mapping] : fresh) arena_->quarantined_ += mapping.bytes();
        quarantined_.merge(fresh);
      }
    }
    throw;
  }
  return fresh;
}

void Region::require_whole_handles(Range const& range) const {
  auto end = range.offset_bytes + range.size_bytes;
  for (auto cut : {range.offset_bytes, end}) {
    auto it = mapped_.lower_bound(cut);
    if (it == mapped_.begin()) continue;
    --it;
    auto handle_end = it->first + it->second.bytes();
    if (cut < handle_end) {
      throw LifecycleError(concat("unmap of ", title(), ": offset ", cut, " is inside the handle [",
                                  it->first, ", ", handle_end,
                                  "); memory goes only by whole handles"));
    }
  }
  if (range.size_bytes != 0 && !covers(range)) {
    throw LifecycleError(concat("unmap of ", title(), ": [", range.offset_bytes, ", ", end,
                                ") is not mapped, or only in part"));
  }
}

// Moves the mappings of the range out, as runs of neighbours.
std::vector<Slots> Region::extract_runs(Range const& range) {
  std::vector<Slots> runs;
  auto it = mapped_.lower_bound(range.offset_bytes);
  auto end = range.offset_bytes + range.size_bytes;
  auto reached = end;
  while (it != mapped_.end() && it->first < end) {
    if (runs.empty() || it->first != reached) runs.emplace_back();
    reached = it->first + it->second.bytes();
    auto node = mapped_.extract(it++);
    runs.back().insert(runs.back().end(), std::move(node));
  }
  return runs;
}

// Stops at the first failure; put_back() is the way back.
Result Region::unmap_runs(std::vector<Slots>& runs) noexcept {
  auto& driver = *arena_->driver_;
  for (auto& run : runs) {
    if (Result result = unmap_run(driver, run); result != kSuccess) return result;
  }
  return kSuccess;
}

void Region::put_back(std::vector<Slots>& runs) noexcept {
  auto& driver = *arena_->driver_;
  for (auto& run : runs) {
    bool untouched = run.begin()->second.mapped();
    if (untouched || restore_run(driver, run) == kSuccess) {
      mapped_.merge(run);
    } else {
      quarantine(run);
    }
  }
}

void Region::give_back(Slots& slots) {
  for (auto& [offset, mapping] : slots) {
    arena_->discharge(*this, mapping.bytes());
    mapped_bytes_ -= mapping.bytes();
    arena_->pool_.give(mapping.memory(), {id_, offset});
  }
  slots.clear();
}

void Region::quarantine(Slots& slots) noexcept {
  for (auto& [offset, mapping] : slots) {
    arena_->discharge(*this, mapping.bytes());
    mapped_bytes_ -= mapping.bytes();
    arena_->quarantined_ += mapping.bytes();
  }
  quarantined_.merge(slots);
  ++generation_;
}

Result Region::heal() {
  Result last = kSuccess;
  for (auto it = quarantined_.begin(); it != quarantined_.end();) {
    auto& mapping = it->second;
    if (mapping.mapped()) {
      if (Result result = mapping.unmap(); result != kSuccess) {
        last = result;
        ++it;
        continue;
      }
    }
    arena_->quarantined_ -= mapping.bytes();
    arena_->pool_.give(mapping.memory(), {id_, it->first});
    it = quarantined_.erase(it);
  }
  return last;
}

}  // namespace aegaeon
