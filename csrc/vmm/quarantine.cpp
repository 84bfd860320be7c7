#include "vmm/quarantine.hpp"

#include <mutex>
#include <set>
#include <utility>

#include "error.hpp"

namespace aegaeon {

Quarantine::Quarantine(std::shared_ptr<Driver> driver, HandlePool& pool, Events& free_events)
    : driver_(std::move(driver)), pool_(pool), free_events_(free_events) {}

Quarantine::~Quarantine() {
  static auto& kept = *new std::pair<std::mutex, std::list<Held>>;  // of the whole process
  std::lock_guard lock(kept.first);
  for (auto it = held_.begin(); it != held_.end();) {
    auto held = it++;
    bool may_be_written = held->filling || (held->work && !held->work->events.empty());
    if (may_be_written) kept.second.splice(kept.second.end(), held_, held);
  }
}

void Quarantine::add(Mapping mapping, bool filling, std::shared_ptr<UnfinishedWork> work) {
  if (mapping.memory()->record.quarantined++ == 0) bytes_ += mapping.bytes();
  held_.push_back({.mapping = std::move(mapping), .filling = filling, .work = std::move(work)});
}

void Quarantine::retire(std::shared_ptr<Reservation> range) {
  Retired retired{.range = std::move(range)};
  if (retired.range.use_count() == 1) retired.last = retired.range->free();
  bool freed = retired.range.use_count() == 1 && retired.last == kSuccess;
  if (!freed) retired_.push_back(std::move(retired));
}

void Quarantine::fills_are_over(Result result) noexcept {
  for (auto& held : held_) {
    if (!held.filling) continue;
    held.filling = result != kSuccess;
    held.last = result;
    held.call = "stream_synchronize";
  }
}

void Quarantine::heal() {
  UnfinishedWork const* asked = nullptr;  // its mappings lie one after another
  Result answer = kSuccess;
  std::erase_if(held_, [&](Held& held) {
    if (held.filling) return false;
    if (held.work) {
      if (held.work.get() != asked) answer = ask(*held.work);
      asked = held.work.get();
      held.last = answer;
      held.call = "event_query";
      if (answer != kSuccess) return false;
    }
    return give_back(held);
  });
  std::erase_if(retired_, [](Retired& retired) {
    if (retired.range.use_count() != 1) return false;  // something is still stuck in it
    retired.last = retired.range->free();
    return retired.last == kSuccess;
  });
}

Result Quarantine::ask(UnfinishedWork& work) {
  while (!work.events.empty()) {
    Result result = driver_->event_query(work.events.back()->id());
    if (result != kSuccess) return result;
    free_events_.push_back(std::move(work.events.back()));
    work.events.pop_back();
  }
  return kSuccess;
}

bool Quarantine::give_back(Held& held) {
  auto& mapping = held.mapping;
  held.call = "mem_unmap";
  held.last = mapping.mapped() ? mapping.unmap() : kSuccess;
  if (held.last != kSuccess) return false;
  if (--mapping.memory()->record.quarantined == 0) {
    bytes_ -= mapping.bytes();
    pool_.give(mapping.memory());
  }
  return true;
}

Events Quarantine::unfinished() const {
  std::set<UnfinishedWork const*> seen;
  Events events;
  for (auto const& held : held_) {
    if (!held.work || !seen.insert(held.work.get()).second) continue;
    events.insert(events.end(), held.work->events.begin(), held.work->events.end());
  }
  return events;
}

void Quarantine::require(Held const& held) const {
  check(*driver_, held.last, held.call, held.mapping.bytes());
}

void Quarantine::require_clear(Reservation const& reservation, Range const& range) const {
  for (auto const& held : held_) {
    auto const& mapping = held.mapping;
    bool inside = mapping.range().get() == &reservation && mapping.offset() < range.end() &&
                  mapping.offset() + mapping.bytes() > range.offset_bytes;
    if (inside) require(held);
  }
}

void Quarantine::require_empty() const {
  for (auto const& held : held_) require(held);
  for (auto const& retired : retired_) {
    check(*driver_, retired.last, "address_free", retired.range->bytes());
  }
}

}  // namespace aegaeon
