#include "vmm/arena.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "error.hpp"
#include "vmm/transaction.hpp"

namespace aegaeon {
namespace {

constexpr std::size_t kLargestChosenHandle = std::size_t{128} << 20;

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
             std::optional<std::size_t> handle_bytes, bool poison, bool exportable)
    : driver_(std::move(driver)),
      capacity_(checked_capacity(*driver_, capacity_bytes)),
      handle_bytes_(checked_handle(*driver_, capacity_, handle_bytes)),
      poison_(poison),
      pool_(driver_, capacity_, handle_bytes_, exportable),
      quarantine_(driver_, pool_, free_events_) {}

// No region and no set is left. What the device does not answer for stays in quarantine for good.
Arena::~Arena() {
  if (unconfirmed_fills_ != 0 && fill_stream_) {
    Result result = driver_->stream_synchronize(fill_stream_->id());
    report(result, "stream_synchronize");
    quarantine_.fills_are_over(result);
  }
  for (auto const& event : quarantine_.unfinished()) {
    report(driver_->event_synchronize(event->id()), "event_synchronize");
  }
  quarantine_.heal();
}

std::shared_ptr<Region> Arena::reserve(std::size_t size_bytes, std::string owner, std::string tag) {
  return make_region(size_bytes, std::move(owner), std::move(tag));
}

std::unique_ptr<Region> Arena::make_region(std::size_t size_bytes, std::string owner,
                                           std::string tag) {
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
  auto entry = regions_.try_emplace(next_id_++, nullptr).first;
  try {
    auto region = std::make_unique<Region>(shared_from_this(), entry->first, size_bytes,
                                           std::move(owner), std::move(tag));
    entry->second = region.get();
    return region;
  } catch (...) {
    regions_.erase(entry);
    throw;
  }
}

void Arena::commit(std::vector<Step> steps) {
  if (!steps.empty()) Transaction(*this, std::move(steps)).commit();
}

std::optional<Shortage> Arena::check(std::vector<Step> steps) {
  return Transaction(*this, std::move(steps)).check();
}

void Arena::set_limit(std::string const& owner, std::size_t min_bytes,
                      std::optional<std::size_t> max_bytes, bool pinned) {
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
  if (min_bytes == 0 && !max_bytes && !pinned) {
    limits_.erase(owner);
  } else {
    limits_[owner] = {.min_bytes = min_bytes, .max_bytes = max_bytes, .pinned = pinned};
  }
}

ArenaStats Arena::stats() const {
  std::lock_guard lock(mutex_);
  return {.owners = ledger_,
          .capacity_bytes = capacity_,
          .free_bytes = free_bytes(),
          .quarantined_bytes = quarantine_.bytes(),
          .handle_bytes = handle_bytes_,
          .num_regions = regions_.size(),
          .pool = pool_.stats()};
}

void Arena::close(bool abandon_views) {
  std::vector<std::shared_ptr<Region>> open;  // dropped unlocked: a region's end takes the mutex
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    if (num_alias_sets_ != 0) {
      throw LifecycleError(concat("close of the arena: ", num_alias_sets_,
                                  " alias set(s) of it are open; close them first"));
    }
    open.reserve(regions_.size());
    for (auto const& [id, region] : regions_) {
      if (auto alive = region->weak_from_this().lock()) open.push_back(std::move(alive));
    }
    for (auto const& region : open) {
      region->require_unused("close");
      if (!abandon_views) region->require_no_views("close");
    }
  }
  for (auto const& region : open) region->close(abandon_views);
  Lock lock(mutex_);
  // Regions reserved meanwhile by another thread are that thread's mistake, not a leak.
  if (owned_ != 0) throw LifecycleError("a region was mapped while the arena was being closed");
  confirm_fills(lock);
  wait_for_quarantined(lock);
  quarantine_.heal();
  quarantine_.require_empty();
  pool_.release_free();
  if (fill_stream_) aegaeon::check(*driver_, fill_stream_->destroy(), "stream_destroy");
  fill_stream_.reset();
  while (!free_events_.empty()) {
    aegaeon::check(*driver_, free_events_.back()->destroy(), "event_destroy");
    free_events_.pop_back();
  }
  closed_ = true;
}

void Arena::charge(Region const& region, std::size_t bytes) {
  if (bytes == 0) return;
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

std::size_t Arena::free_bytes() const noexcept {
  return capacity_ - owned_ - quarantine_.bytes();
}

std::string Arena::holders() const {
  std::vector<std::pair<std::size_t, std::string>> lines;
  for (auto const& [who, bytes] : ledger_) {
    lines.emplace_back(bytes, concat("'", who.first, "' (", who.second, ") ", human_bytes(bytes)));
  }
  std::stable_sort(lines.begin(), lines.end(),
                   [](auto const& a, auto const& b) { return a.first > b.first; });
  std::string text = lines.empty() ? "Nobody holds any" : "Held: ";
  for (std::size_t i = 0; i < lines.size(); ++i) text += concat(i ? ", " : "", lines[i].second);
  if (auto bytes = quarantine_.bytes()) text += concat("; quarantined: ", human_bytes(bytes));
  return text;
}

// Whether the device is done with fills that could not be waited for. Gives the lock up.
void Arena::confirm_fills(Lock& lock) {
  if (unconfirmed_fills_ == 0) return;
  auto asked = unconfirmed_fills_;
  auto stream = fill_stream_->id();
  lock.unlock();
  Result result = driver_->stream_synchronize(stream);
  lock.lock();
  if (unconfirmed_fills_ != asked) return;  // others have failed meanwhile, or it has been done
  quarantine_.fills_are_over(result);
  if (result == kSuccess) unconfirmed_fills_ = 0;
}

// Of the work that nobody could wait for when its region ended. Gives the lock up.
void Arena::wait_for_quarantined(Lock& lock) {
  auto events = quarantine_.unfinished();
  if (events.empty()) return;
  lock.unlock();
  for (auto const& event : events) {
    aegaeon::check(*driver_, driver_->event_synchronize(event->id()), "event_synchronize");
  }
  lock.lock();
}

StreamId Arena::fill_stream() {
  if (!fill_stream_) fill_stream_ = std::make_unique<Stream>(driver_);
  return fill_stream_->id();
}

std::shared_ptr<Event> Arena::take_event() {
  if (free_events_.empty()) return std::make_shared<Event>(driver_);
  auto event = std::move(free_events_.back());
  free_events_.pop_back();
  return event;
}

}  // namespace aegaeon
