#include "vmm/transaction.hpp"

#include <algorithm>
#include <utility>

namespace aegaeon {
Transaction::Transaction(Arena& arena, std::vector<Step> steps, std::shared_ptr<Region> closing,
                         bool abandon_views, AliasSet const* on_behalf_of)
    : arena_(arena),
      steps_(std::move(steps)),
      closing_(std::move(closing)),
      abandon_views_(abandon_views),
      on_behalf_of_(on_behalf_of) {
  for (auto const& step : steps_) {
    if (step.region->arena_.get() != &arena_) {
      throw std::invalid_argument(
          concat("the region ", step.region->title(), " belongs to another arena"));
    }
  }
}

std::optional<Shortage> Transaction::check() {
  Lock lock(arena_.mutex_);
  wait_until_unchanging(lock);
  arena_.quarantine_.heal();
  return arena_.shortage(plan());
}

void Transaction::commit(std::function<void()> const& also) {
  Lock lock(arena_.mutex_);
  std::exception_ptr error;
  try {
    prepare(lock);
  } catch (...) {
    error = std::current_exception();
    if (!lock.owns_lock()) lock.lock();
  }
  if (!error) {
    if (closing_ && closing_->closed_) return;
    set_changing(true);
    first_number_ = arena_.next_id_;
    try {
      applied_.reserve(planned_.size());
      for (auto const& step : planned_) apply(step);
      fill(lock);
      protect();
      free_address();
    } catch (...) {
      error = std::current_exception();
      if (!lock.owns_lock()) lock.lock();
    }
    if (error) {
      roll_back();
    } else {
      finish();
      if (also) also();
    }
    set_changing(false);
  }
  auto calls =
      error ? notices_.after_failure(planned_) : Notices::after_success(planned_, first_number_);
  lock.unlock();
  auto hook_error = Notices::tell_after(calls);
  if (error) rethrow_with_losses(error);
  if (hook_error) std::rethrow_exception(hook_error);
}

// -- before anything changes ---------------------------------------------------------------------

// Checks, admits, waits for the device and for hooks, until all of that holds at once.
void Transaction::prepare(Lock& lock) {
  for (;;) {
    wait_until_unchanging(lock);
    arena_.confirm_fills(lock);
    wait_until_unchanging(lock);
    arena_.quarantine_.heal();
    planned_ = closing_ ? plan_close() : plan();
    if (auto shortage = arena_.shortage(planned_)) {
      OutOfMemory error(shortage->message, "map", kDriverOutOfMemory, shortage->requested_bytes);
      error.shortage = std::make_shared<Shortage const>(*std::move(shortage));
      throw error;
    }
    if (!wait_for_events(lock) && !notices_.tell_before(lock, planned_)) {
      return;
    }
  }
}

void Transaction::wait_until_unchanging(Lock& lock) {
  arena_.changed_.wait(lock, [&] {
    return (!closing_ || !closing_->changing_) &&
           std::none_of(steps_.begin(), steps_.end(),
                        [](Step const& step) { return step.region->changing_; });
  });
}

std::vector<PlannedStep> Transaction::plan() const {
  // A region that several steps touch is checked against what the earlier ones leave of it.
  std::map<Region const*, std::size_t> steps_left;
  for (auto const& step : steps_) ++steps_left[step.region.get()];
  std::map<Region const*, SlotMap> ahead;
  std::vector<PlannedStep> planned;
  planned.reserve(steps_.size());
  for (auto const& step : steps_) {
    auto& region = *step.region;
    bool maps = step.kind == Step::Kind::kMap;
    char const* verb = maps ? "map" : "unmap";
    region.require_open(verb);
    region.require_part_of(on_behalf_of_, verb);
    auto range = region.checked_range(verb, step.offset_bytes, step.size_bytes);
    auto found = ahead.find(&region);
    SlotMap const& slots = found == ahead.end() ? region.slots_ : found->second;
    auto bytes = range.size_bytes;
    if (maps) {
      arena_.quarantine_.require_clear(*region.range_, range);
      if (auto taken = slots.first_overlap(range)) {
        throw LifecycleError(concat("map of ", region.title(), ": [", taken->offset_bytes, ", ",
                                    taken->end(), ") is mapped already"));
      }
    } else {
      region.require_unused(verb);
      region.require_whole_slots(verb, slots, range, step.size_bytes.has_value());
      bytes = 0;
      for (auto const& slot : slots.slots_in(range)) bytes += slot.size_bytes;
    }
    planned.push_back({step.kind, step.region, range, bytes, step.contents, step.read_only});
    if (--steps_left[&region] == 0) continue;
    auto& left = ahead.try_emplace(&region, slots).first->second;
    if (maps) {
      for (auto const& slot : region.slots_for(range)) left.add(slot);
    } else {
      left.erase(range);
    }
  }
  return planned;
}

std::vector<PlannedStep> Transaction::plan_close() const {
  if (closing_->closed_) return {};
  closing_->require_part_of(on_behalf_of_, "close");
  closing_->require_unused("close");
  if (!abandon_views_) closing_->require_no_views("close");
  Range all{0, closing_->size_bytes()};
  arena_.quarantine_.require_clear(*closing_->range_, all);
  if (closing_->mapped_bytes_ == 0) return {};
  return {{Step::Kind::kUnmap, closing_, all, closing_->mapped_bytes_, Contents::kPreserve, false}};
}

bool Transaction::wait_for_events(Lock& lock) {
  std::vector<Region*> regions;
  for (auto const& step : planned_) {
    if (step.kind == Step::Kind::kMap) continue;
    if (std::find(regions.begin(), regions.end(), step.region.get()) != regions.end()) continue;
    regions.push_back(step.region.get());
  }
  return Region::wait_for_events(lock, regions);
}

void Transaction::set_changing(bool changing) {
  for (auto const& step : planned_) step.region->changing_ = changing;
  if (closing_) closing_->changing_ = changing;
  if (!changing) arena_.changed_.notify_all();
}

void Transaction::free_address() {
  if (!closing_ || closing_->num_exports_ != 0) return;
  aegaeon::check(*arena_.driver_, closing_->range_->free(), "address_free", closing_->size_bytes());
}

void Transaction::finish() {
  for (auto const& applied : applied_) {
    auto& region = *applied.step->region;
    ++region.generation_;
    if (applied.step->kind == Step::Kind::kUnmap) continue;
    auto [begin, end] = region.mappings_in(applied.step->range);
    for (auto it = begin; it != end; ++it) it->second.memory()->record.owner = region.owner_;
  }
  if (closing_) {
    closing_->drop_events();
    ended_hooks_.swap(closing_->hooks_);
    arena_.hooked_.erase(closing_->id_);
    arena_.regions_.erase(closing_->id_);
    closing_->closed_ = true;
  }
}

}  // namespace aegaeon
