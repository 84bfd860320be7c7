#include "vmm/arena.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "error.hpp"

namespace aegaeon {
namespace {

constexpr std::size_t kLargestChosenHandle = std::size_t{64} << 20;

std::size_t choose_handle_bytes(std::size_t granularity, std::size_t capacity) {
  auto wanted = std::bit_floor(std::max<std::size_t>(capacity / 256, 1));
  return std::clamp(wanted, granularity, std::max(granularity, kLargestChosenHandle));
}

std::size_t checked_capacity(Driver const& driver, std::size_t capacity) {
  auto granularity = driver.granularity_bytes();
  if (capacity == 0 || capacity % granularity != 0) {
    throw std::invalid_argument(concat("capacity_bytes=", capacity,
                                       " has to be a positive multiple of the granularity, ",
                                       granularity, " bytes"));
  }
  return capacity;
}

std::size_t checked_handle(Driver const& driver, std::size_t capacity,
                           std::optional<std::size_t> handle) {
  auto granularity = driver.granularity_bytes();
  if (!handle) return choose_handle_bytes(granularity, capacity);
  if (*handle == 0 || *handle % granularity != 0 || *handle > capacity) {
    throw std::invalid_argument(concat("handle_bytes=", *handle,
                                       " has to be a multiple of the granularity, ", granularity,
                                       " bytes, and at most the capacity, ", capacity));
  }
  return *handle;
}

}  // namespace

Arena::Arena(std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
             std::optional<std::size_t> handle_bytes)
    : driver_(std::move(driver)),
      capacity_(checked_capacity(*driver_, capacity_bytes)),
      handle_bytes_(checked_handle(*driver_, capacity_, handle_bytes)),
      pool_(driver_, capacity_, handle_bytes_) {}

Arena::~Arena() = default;

std::shared_ptr<Region> Arena::reserve(std::size_t size_bytes, std::string owner, std::string tag) {
  auto granularity = driver_->granularity_bytes();
  if (size_bytes == 0 || size_bytes % granularity != 0) {
    throw std::invalid_argument(concat("size_bytes=", size_bytes,
                                       " has to be a positive multiple of the granularity, ",
                                       granularity, " bytes"));
  }
  std::lock_guard lock(mutex_);
  if (closed_) throw LifecycleError("reserve on a closed arena");
  // The entry first: a region that existed and could not be entered would end here, under the mutex
  // its destructor takes.
  auto entry = regions_.try_emplace(next_region_id_++).first;
  try {
    auto region = std::make_shared<Region>(shared_from_this(), entry->first, size_bytes,
                                           std::move(owner), std::move(tag));
    entry->second = region;
    return region;
  } catch (...) {
    regions_.erase(entry);
    throw;
  }
}

void Arena::set_limit(std::string const& owner, std::size_t min_bytes,
                      std::optional<std::size_t> max_bytes) {
  if (max_bytes && *max_bytes < min_bytes) {
    throw std::invalid_argument(
        concat("limit of '", owner, "': max_bytes=", *max_bytes, " < min_bytes=", min_bytes));
  }
  std::lock_guard lock(mutex_);
  std::size_t guaranteed = min_bytes;
  for (auto const& [other, limit] : limits_) {
    if (other != owner) guaranteed += limit.min_bytes;
  }
  if (guaranteed > capacity_) {
    throw std::invalid_argument(concat("limit of '", owner, "': the minima of all owners sum to ",
                                       human_bytes(guaranteed), ", more than the capacity of ",
                                       human_bytes(capacity_)));
  }
  if (min_bytes == 0 && !max_bytes) {
    limits_.erase(owner);
  } else {
    limits_[owner] = {.min_bytes = min_bytes, .max_bytes = max_bytes};
  }
}

ArenaStats Arena::stats() const {
  std::lock_guard lock(mutex_);
  return {.owners = ledger_,
          .capacity_bytes = capacity_,
          .free_bytes = free_bytes(),
          .quarantined_bytes = quarantined_,
          .handle_bytes = handle_bytes_,
          .num_regions = regions_.size(),
          .pool = pool_.stats()};
}

void Arena::close() {
  std::vector<std::shared_ptr<Region>> open;  // dropped unlocked: a region's end takes the mutex
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    for (auto const& [id, weak] : regions_) {
      if (auto region = weak.lock()) open.push_back(std::move(region));
    }
    for (auto const& region : open) region->require_unused("close");
  }
  for (auto const& region : open) region->close();
  std::lock_guard lock(mutex_);
  // Regions reserved meanwhile by another thread are that thread's mistake, not a leak.
  if (owned_ != 0) throw LifecycleError("a region was mapped while the arena was being closed");
  for (auto& mapping : lost_) {
    if (!mapping.mapped()) continue;
    check(*driver_, mapping.unmap(), "mem_unmap", mapping.bytes());
    quarantined_ -= mapping.bytes();
    pool_.give(mapping.memory(), {});
  }
  lost_.clear();
  pool_.release_free();
  closed_ = true;
}

void Arena::admit(Region const& region, std::size_t bytes) const {
  auto const& owner = region.owner();
  auto attempt = [&](std::size_t missing, std::string const& reason) {
    return OutOfMemory(
        concat("cannot map ", human_bytes(bytes), " for ", region.title(), " on ", driver_->name(),
               ": ", reason, "; ", human_bytes(missing), " missing. ", holders()),
        "map", kDriverOutOfMemory, bytes);
  };
  auto limit = limits_.find(owner);
  if (limit != limits_.end() && limit->second.max_bytes) {
    auto allowed = *limit->second.max_bytes;
    auto held = owned_by(owner);
    if (held + bytes > allowed) {
      throw attempt(held + bytes - allowed, concat("'", owner, "' holds ", human_bytes(held),
                                                   " of at most ", human_bytes(allowed)));
    }
  }
  std::size_t kept_for_others = 0;
  for (auto const& [other, other_limit] : limits_) {
    auto held = owned_by(other);
    if (other != owner && held < other_limit.min_bytes) {
      kept_for_others += other_limit.min_bytes - held;
    }
  }
  auto available = free_bytes() - std::min(free_bytes(), kept_for_others);
  if (bytes <= available) return;
  auto reason = concat(human_bytes(free_bytes()), " of ", human_bytes(capacity_), " free");
  if (kept_for_others != 0) {
    reason += concat(", of which ", human_bytes(kept_for_others), " kept for other owners' minima");
  }
  throw attempt(bytes - available, reason);
}

void Arena::charge(Region const& region, std::size_t bytes) {
  ledger_[{region.owner(), region.tag()}] += bytes;
  owned_ += bytes;
}

void Arena::discharge(Region const& region, std::size_t bytes) noexcept {
  auto found = ledger_.find({region.owner(), region.tag()});
  if (found == ledger_.end()) return;
  found->second -= bytes;
  owned_ -= bytes;
  if (found->second == 0) ledger_.erase(found);
}

std::size_t Arena::owned_by(std::string const& owner) const {
  std::size_t sum = 0;
  for (auto it = ledger_.lower_bound({owner, ""}); it != ledger_.end() && it->first.first == owner;
       ++it) {
    sum += it->second;
  }
  return sum;
}

std::size_t Arena::free_bytes() const noexcept {
  return capacity_ - owned_ - quarantined_;
}

std::string Arena::holders() const {
  if (ledger_.empty()) return "Nobody holds any";
  std::vector<std::pair<std::size_t, std::string>> lines;
  for (auto const& [who, bytes] : ledger_) {
    lines.emplace_back(bytes, concat("'", who.first, "' (", who.second, ") ", human_bytes(bytes)));
  }
  std::stable_sort(lines.begin(), lines.end(),
                   [](auto const& a, auto const& b) { return a.first > b.first; });
  std::string text = "Held: ";
  for (std::size_t i = 0; i < lines.size(); ++i) text += concat(i ? ", " : "", lines[i].second);
  if (quarantined_ != 0) text += concat("; quarantined: ", human_bytes(quarantined_));
  return text;
}

}  // namespace aegaeon
