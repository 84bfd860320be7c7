// Admission: whether a plan fits the budget, and if not, who would have to give how much.
#include "vmm/shortage.hpp"

#include <algorithm>
#include <set>

#include "error.hpp"
#include "vmm/arena.hpp"

namespace aegaeon {
namespace {

using Signed = std::int64_t;

Signed as_signed(std::size_t bytes) {
  return static_cast<Signed>(bytes);
}

}  // namespace

std::map<std::string, std::size_t> Arena::bytes_by_owner() const {
  std::map<std::string, std::size_t> held;
  for (auto const& [who, bytes] : ledger_) held[who.first] += bytes;
  return held;
}

std::optional<Shortage> Arena::shortage(std::vector<PlannedStep> const& plan) const {
  auto held = bytes_by_owner();
  auto free = as_signed(free_bytes());
  Signed missing = 0;         // at the worst moment of the plan
  Signed missing_at_all = 0;  // the same if there were no minima
  Signed over_maximum = 0;
  std::size_t requested = 0;
  std::size_t kept_at_first = 0;
  std::string maximum;
  PlannedStep const* first = nullptr;
  PlannedStep const* first_over = nullptr;
  for (auto const& step : plan) {
    auto const& owner = step.region->owner();
    auto& own = held[owner];
    if (step.kind == Step::Kind::kUnmap) {
      own -= step.bytes;
      free += as_signed(step.bytes);
      continue;
    }
    requested += step.bytes;
    auto limit = limits_.find(owner);
    if (limit != limits_.end() && limit->second.max_bytes) {
      auto over = as_signed(own + step.bytes) - as_signed(*limit->second.max_bytes);
      over_maximum = std::max(over_maximum, over);
      if (over > 0 && first_over == nullptr) {
        first_over = &step;
        maximum = concat("'", owner, "' holds ", human_bytes(own), " of at most ",
                         human_bytes(*limit->second.max_bytes));
      }
    }
    std::size_t kept_for_others = 0;
    for (auto const& [other, other_limit] : limits_) {
      auto found = held.find(other);
      auto others = found == held.end() ? 0 : found->second;
      if (other != owner && others < other_limit.min_bytes) {
        kept_for_others += other_limit.min_bytes - others;
      }
    }
    auto bytes = as_signed(step.bytes);
    auto lacking = bytes + as_signed(kept_for_others) - free;
    missing = std::max(missing, lacking);
    missing_at_all = std::max(missing_at_all, bytes - free);
    if (lacking > 0 && first == nullptr) {
      first = &step;
      kept_at_first = kept_for_others;
    }
    own += step.bytes;
    free -= bytes;
  }
  if (first == nullptr && first_over == nullptr) return std::nullopt;
  auto const& refused = first_over != nullptr ? *first_over : *first;
  Shortage shortage;
  shortage.owner = refused.region->owner();
  shortage.tag = refused.region->tag();
  shortage.requested_bytes = requested;
  shortage.free_bytes = free_bytes();
  shortage.holders = ledger_;
  std::string why;
  if (first_over != nullptr) {
    shortage.reason = ShortageReason::kOwnerMaximum;
    shortage.missing_bytes = static_cast<std::size_t>(over_maximum);
    why = maximum;
  } else {
    shortage.reason = missing_at_all > 0 ? ShortageReason::kCapacity : ShortageReason::kOtherMinima;
    shortage.missing_bytes = static_cast<std::size_t>(missing);
    why = concat(human_bytes(free_bytes()), " of ", human_bytes(capacity_), " free");
    if (kept_at_first != 0) {
      why += concat(", of which ", human_bytes(kept_at_first), " kept for other owners' minima");
    }
  }
  find_evictable(plan, shortage);
  std::string evict = shortage.evictable.empty() ? shortage.why_none : "would have to go: ";
  for (auto const& [owner, tag, bytes] : shortage.evictable) {
    evict += concat(&bytes == &shortage.evictable.front().bytes ? "" : ", ", "'", owner, "' (", tag,
                    ") ", human_bytes(bytes));
  }
  shortage.message =
      concat("cannot map ", human_bytes(requested), " for ", refused.region->title(),
             plan.size() > 1 ? concat(" in a plan of ", plan.size(), " steps") : "", " on ",
             driver_->name(), ": ", why, "; ", human_bytes(shortage.missing_bytes), " missing. ",
             holders(), "; ", evict);
  return shortage;
}

// The smallest holding that covers all that is missing, else the largest ones together. Holdings
// are what may go of one (owner, tag): not pinned, not in use, not in the plan, not below the
// owner's minimum. When the owner's own maximum is in the way, only its own holdings help.
void Arena::find_evictable(std::vector<PlannedStep> const& plan, Shortage& shortage) const {
  std::set<Region const*> planned;
  std::set<std::string> asking;
  for (auto const& step : plan) {
    planned.insert(step.region.get());
    if (step.kind == Step::Kind::kMap) asking.insert(step.region->owner());
  }
  bool own = shortage.reason == ShortageReason::kOwnerMaximum;
  std::map<Holder, std::size_t> holdings;
  std::size_t num_pinned = 0, num_in_use = 0;
  for (auto const& [id, region] : regions_) {
    auto const& owner = region->owner();
    auto bytes = region->mapped_bytes();
    if (bytes == 0 || planned.contains(region)) continue;
    if (own ? owner != shortage.owner : asking.contains(owner)) continue;
    if (auto limit = limits_.find(owner); limit != limits_.end() && limit->second.pinned) {
      ++num_pinned;
    } else if (region->num_uses_ != 0 || !region->holds_.empty() || region->alias_set_ != nullptr) {
      ++num_in_use;
    } else {
      holdings[{owner, region->tag()}] += bytes;
    }
  }
  // An owner below its minimum gives nothing: what it gave would be kept for it.
  std::map<std::string, std::size_t> may_give;
  for (auto const& [owner, bytes] : bytes_by_owner()) {
    auto limit = limits_.find(owner);
    auto minimum = limit == limits_.end() ? 0 : limit->second.min_bytes;
    may_give[owner] = bytes - std::min(bytes, minimum);
  }
  std::vector<Evictable> candidates;
  for (auto const& [who, bytes] : holdings) {
    auto& left = may_give[who.first];
    auto given = std::min(bytes, left);
    left -= given;
    if (given != 0) candidates.push_back({who.first, who.second, given});
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](auto const& a, auto const& b) { return a.bytes > b.bytes; });
  auto missing = shortage.missing_bytes;
  auto& chosen = shortage.evictable;
  auto one = std::find_if(candidates.rbegin(), candidates.rend(),
                          [&](auto const& candidate) { return candidate.bytes >= missing; });
  if (one != candidates.rend()) {
    chosen.push_back(*one);
  } else {
    std::size_t sum = 0;
    for (auto const& candidate : candidates) {
      if (sum >= missing) break;
      chosen.push_back(candidate);
      sum += candidate.bytes;
    }
    if (sum < missing) {
      chosen.clear();
      shortage.why_none =
          concat("nothing that may go would suffice: ", human_bytes(sum), " could go, ", num_pinned,
                 " region(s) are pinned, ", num_in_use, " in use");
      return;
    }
  }
  // Of the last one only as much as is needed, by whole handles.
  std::size_t before = 0;
  for (std::size_t i = 0; i + 1 < chosen.size(); ++i) before += chosen[i].bytes;
  auto rest = (missing - before + handle_bytes_ - 1) / handle_bytes_ * handle_bytes_;
  chosen.back().bytes = std::min(chosen.back().bytes, rest);
}

}  // namespace aegaeon
