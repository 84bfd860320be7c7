// Transaction, backwards: what was carried out is undone in reverse, and what that costs is said.
#include <utility>

#include "vmm/transaction.hpp"

namespace aegaeon {
namespace {

template <typename Failure>
[[noreturn]] void throw_with(Failure failure, std::vector<RegionRange> const& quarantined,
                             std::vector<RegionRange> const& lost_contents) {
  failure.quarantined = quarantined;
  failure.lost_contents = lost_contents;
  throw failure;
}

std::string listed(std::vector<RegionRange> const& ranges) {
  std::string text;
  for (auto const& range : ranges) {
    text += concat(text.empty() ? "" : ", ", "'", range.owner, "' (", range.tag, ") [",
                   range.offset_bytes, ", ", range.offset_bytes + range.size_bytes, ")");
  }
  return text;
}

// Neighbours are joined.
void add_range(std::vector<RegionRange>& to, Region const& region, Range const& range) {
  if (!to.empty() && to.back().owner == region.owner() && to.back().tag == region.tag() &&
      to.back().offset_bytes + to.back().size_bytes == range.offset_bytes) {
    to.back().size_bytes += range.size_bytes;
  } else {
    to.push_back({region.owner(), region.tag(), range.offset_bytes, range.size_bytes});
  }
}

}  // namespace

void Transaction::roll_back() {
  for (auto it = applied_.rbegin(); it != applied_.rend(); ++it) {
    if (it->step->kind == Step::Kind::kMap) {
      undo_map(*it);
    } else {
      undo_unmap(*it);
      ++it->step->region->generation_;
    }
  }
}

void Transaction::undo_map(Applied& applied) {
  auto& region = *applied.step->region;
  if (applied.entered) {
    auto range = applied.step->range;
    applied.mappings = region.extract(range);
    std::size_t bytes = 0;
    for (auto const& [offset, mapping] : applied.mappings) bytes += mapping.bytes();
    region.slots_.erase(range);
    region.mapped_bytes_ -= bytes;
    arena_.discharge(region, bytes);
  }
  auto may_be_written = [&](Mapping const& mapping) {
    return fills_unconfirmed_ && filled_.contains(mapping.memory().get());
  };
  for_each_run(
      applied.mappings.begin(), applied.mappings.end(),
      [&](Mapping const& mapping) { return !may_be_written(mapping); },
      [&](auto first, auto last) {
        if (unmap_run(*arena_.driver_, first, last) == kSuccess) return;
        for (auto it = first; it != last; ++it) static_cast<void>(it->second.unmap());
      });
  for (auto& [offset, mapping] : applied.mappings) {
    if (!mapping.mapped()) continue;
    add_range(quarantined_, region, {offset, mapping.bytes()});
    bool filling = may_be_written(mapping);
    arena_.quarantine_.add(std::move(mapping), filling);
  }
  for (auto& memory : applied.taken) {
    // Not what a later step of the plan has freed, and spent or brought back already.
    bool is_ours = memory->live() && !memory->record.quarantined && memory->record.pool_age == 0;
    if (is_ours) arena_.pool_.give(std::move(memory));
  }
}

void Transaction::undo_unmap(Applied& applied) {
  auto& region = *applied.step->region;
  auto& driver = *arena_.driver_;
  auto& mappings = applied.mappings;
  if (!applied.entered) {
    region.slots_.erase(applied.step->range);
    region.mapped_bytes_ -= applied.step->bytes;
    arena_.discharge(region, applied.step->bytes);
  }
  auto give_up = [&](Slots::iterator it, bool quarantine) {
    Range range{it->first, it->second.bytes()};
    if (!is_own(it->second)) add_range(lost_contents_, region, range);
    if (quarantine) {
      add_range(quarantined_, region, range);
      arena_.quarantine_.add(std::move(it->second), false);
    }
    return mappings.erase(it);
  };
  for (auto it = mappings.begin(); it != mappings.end();) {
    auto& mapping = it->second;
    auto& memory = *mapping.memory();
    if (mapping.mapped()) {  // its run was not reached
      ++it;
    } else if (!memory.live() || memory.record.quarantined) {
      it = give_up(it, false);  // made way for small handles, or is stuck where the plan mapped it
    } else {
      arena_.pool_.withdraw(memory);
      it = mapping.map() == kSuccess ? std::next(it) : give_up(it, true);
    }
  }
  for (auto access : {Access::kReadWrite, Access::kRead}) {
    for_each_run(
        mappings.begin(), mappings.end(),
        [&](Mapping const& mapping) {
          return mapping.access() == Access::kNone && region.wanted_access(mapping) == access;
        },
        [&](auto first, auto last) {
          if (set_run_access(driver, first, last, access) == kSuccess) return;
          for (auto it = first; it != last; ++it) static_cast<void>(it->second.set_access(access));
        });
  }
  std::size_t bytes = 0;
  for (auto it = mappings.begin(); it != mappings.end();) {
    auto& mapping = it->second;
    if (mapping.access() == Access::kNone) {
      static_cast<void>(mapping.unmap());
      it = give_up(it, true);
      continue;
    }
    if (!is_own(mapping) && filled_.contains(mapping.memory().get())) {
      add_range(lost_contents_, region, {it->first, mapping.bytes()});
    }
    bytes += mapping.bytes();
    ++it;
  }
  for (auto const& slot : applied.slots) {
    auto first = mappings.lower_bound(slot.offset_bytes);
    auto last = mappings.lower_bound(slot.end());
    std::size_t whole = 0;
    for (auto it = first; it != last; ++it) whole += it->second.bytes();
    if (whole == slot.size_bytes) {
      region.slots_.add(slot);
      continue;
    }
    for (auto it = first; it != last; ++it) region.slots_.add({it->first, it->second.bytes()});
  }
  region.mapped_bytes_ += bytes;
  arena_.charge(region, bytes);
  region.mapped_.merge(mappings);
}

void Transaction::rethrow_with_losses(std::exception_ptr error) const {
  if (quarantined_.empty() && lost_contents_.empty()) std::rethrow_exception(error);
  std::string losses;
  if (!quarantined_.empty()) {
    losses += concat("; the way back failed too, quarantined: ", listed(quarantined_));
  }
  if (!lost_contents_.empty()) losses += concat("; contents lost: ", listed(lost_contents_));
  try {
    std::rethrow_exception(error);
  } catch (OutOfMemory const& cause) {
    throw_with(OutOfMemory(cause.what() + losses, cause.call, cause.code, cause.bytes),
               quarantined_, lost_contents_);
  } catch (DriverError const& cause) {
    throw_with(DriverError(cause.what() + losses, cause.call, cause.code, cause.bytes),
               quarantined_, lost_contents_);
  }
}

}  // namespace aegaeon
