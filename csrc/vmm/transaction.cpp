#include "vmm/transaction.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace aegaeon {
namespace {

bool promises_zeros(Driver const& driver) {
  return driver.kind() == DeviceKind::kHost;  // a memfd; cuda.h promises nothing
}

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
  arena_.heal();
  return arena_.shortage(plan());
}

void Transaction::commit() {
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
    }
    set_changing(false);
  }
  auto notices = notices_after(error != nullptr);
  lock.unlock();
  auto hook_error = tell_after(notices);
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
    arena_.heal();
    planned_ = closing_ ? plan_close() : plan();
    if (auto shortage = arena_.shortage(planned_)) {
      OutOfMemory error(shortage->message, "map", kDriverOutOfMemory, shortage->requested_bytes);
      error.shortage = std::make_shared<Shortage const>(*std::move(shortage));
      throw error;
    }
    if (!wait_for_events(lock) && !tell_before(lock)) return;
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
      arena_.require_not_quarantined(region, range);
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
  arena_.require_not_quarantined(*closing_, all);
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

bool Transaction::tell_before(Lock& lock) {
  std::vector<Notice> notices;
  auto told = [&](Region const* region, std::uint64_t id, Range const& run) {
    return std::any_of(told_.begin(), told_.end(), [&](Notice const& notice) {
      return notice.region.get() == region && notice.hook_id == id &&
             notice.range.offset_bytes == run.offset_bytes &&
             notice.range.size_bytes == run.size_bytes;
    });
  };
  for (auto const& step : planned_) {
    if (step.kind == Step::Kind::kMap) continue;
    for (auto const& [id, hooks] : step.region->hooks_) {
      for (auto const& run : step.region->slots_.runs_in(step.range)) {
        if (!told(step.region.get(), id, run)) notices.push_back({step.region, id, hooks, run});
      }
    }
  }
  if (notices.empty()) return false;
  lock.unlock();
  for (auto& notice : notices) {
    if (notice.hooks->before_unmap) notice.hooks->before_unmap(notice.range);
    told_.push_back(std::move(notice));
  }
  lock.lock();
  return true;
}

// What has been mapped; after a failure, what has been told before_unmap and is mapped after all.
std::vector<Transaction::Notice> Transaction::notices_after(bool failed) const {
  std::vector<Notice> notices;
  auto add = [&](Notice const& notice) {
    for (auto const& run : notice.region->slots_.runs_in(notice.range)) {
      notices.push_back({notice.region, notice.hook_id, notice.hooks, run});
    }
  };
  if (failed) {
    for (auto const& notice : told_) {
      if (notice.region->hooks_.contains(notice.hook_id)) add(notice);
    }
    return notices;
  }
  for (auto const& step : planned_) {
    if (step.kind == Step::Kind::kUnmap) continue;
    for (auto const& [id, hooks] : step.region->hooks_) add({step.region, id, hooks, step.range});
  }
  return notices;
}

// All of them are called; the first error.
std::exception_ptr Transaction::tell_after(std::vector<Notice> const& notices) {
  std::exception_ptr first;
  for (auto const& notice : notices) {
    if (!notice.hooks->after_map) continue;
    try {
      notice.hooks->after_map(notice.range);
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  }
  return first;
}

void Transaction::set_changing(bool changing) {
  for (auto const& step : planned_) step.region->changing_ = changing;
  if (closing_) closing_->changing_ = changing;
  if (!changing) arena_.changed_.notify_all();
}

// -- forward -------------------------------------------------------------------------------------

void Transaction::apply(PlannedStep const& step) {
  auto& applied = applied_.emplace_back();
  applied.step = &step;
  if (step.kind == Step::Kind::kMap) {
    apply_map(applied);
  } else {
    apply_unmap(applied);
  }
}

void Transaction::apply_map(Applied& applied) {
  auto const& step = *applied.step;
  auto& region = *step.region;
  auto slots = region.slots_for(step.range);
  // Memory first: what is short shows before an address has changed.
  for (auto const& slot : slots) {
    arena_.pool_.take(slot.size_bytes, region.id_, slot.offset_bytes, applied.taken);
  }
  bool is_filled = false;
  auto offset = step.range.offset_bytes;
  for (auto const& memory : applied.taken) {
    auto placed =
        applied.mappings.try_emplace(offset, arena_.driver_, region.range_, offset, memory).first;
    placed->second.read_only = step.read_only;
    is_filled = is_filled || fill_value(step, *memory);
    offset += memory->bytes();
  }
  auto access = is_filled ? Access::kReadWrite : region.wanted_access(step.read_only);
  aegaeon::check(
      *arena_.driver_,
      set_run_access(*arena_.driver_, applied.mappings.begin(), applied.mappings.end(), access),
      "mem_set_access", step.bytes);
  for (auto const& slot : slots) region.slots_.add(slot);
  region.mapped_bytes_ += step.bytes;
  arena_.charge(region, step.bytes);
  region.mapped_.merge(applied.mappings);
  applied.entered = true;
}

void Transaction::apply_unmap(Applied& applied) {
  auto const& step = *applied.step;
  auto& region = *step.region;
  applied.slots = region.slots_.slots_in(step.range);
  applied.mappings = region.extract(step.range);
  Result result = kSuccess;
  for_each_run(
      applied.mappings.begin(), applied.mappings.end(), [](Mapping const&) { return true; },
      [&](auto first, auto last) {
        if (result == kSuccess) result = unmap_run(*arena_.driver_, first, last);
      });
  aegaeon::check(*arena_.driver_, result, "mem_unmap", step.bytes);
  region.slots_.erase(step.range);
  region.mapped_bytes_ -= step.bytes;
  arena_.discharge(region, step.bytes);
  for (auto const& [offset, mapping] : applied.mappings) {
    mapping.memory()->record.region_id = region.id_;
    mapping.memory()->record.offset = offset;
    arena_.pool_.give(mapping.memory());
  }
  applied.entered = true;
}

// What the handle has to be filled with before the region's owner may see it.
std::optional<std::uint8_t> Transaction::fill_value(PlannedStep const& step,
                                                    Allocation const& memory) const {
  auto contents = step.contents;
  if (arena_.poison_ && contents == Contents::kPreserve) contents = Contents::kPoison;
  if (contents == Contents::kPreserve) return std::nullopt;
  if (contents == Contents::kPoison) return kPoisonByte;
  auto const& owner = memory.record.owner;
  bool foreign = owner ? *owner != step.region->owner_ : !promises_zeros(*arena_.driver_);
  if (foreign) return std::uint8_t{0};
  // The owner's own old bytes, which it must not count on.
  if (arena_.poison_ && owner) return kPoisonByte;
  return std::nullopt;
}

// One per run of equal values; those that destroy what a failure would have to restore come last.
std::vector<Transaction::Fill> Transaction::fills() {
  std::set<Allocation const*> restorable;
  std::map<std::pair<Region*, std::size_t>, std::pair<Mapping const*, std::uint8_t>> wanted;
  for (auto const& applied : applied_) {
    auto& region = *applied.step->region;
    if (applied.step->kind == Step::Kind::kUnmap) {
      for (auto const& [offset, mapping] : applied.mappings) {
        restorable.insert(mapping.memory().get());
      }
      continue;
    }
    auto [begin, end] = region.mappings_in(applied.step->range);
    for (auto it = begin; it != end; ++it) {
      std::pair key(&region, it->first);
      if (auto value = fill_value(*applied.step, *it->second.memory())) {
        wanted.insert_or_assign(key, std::pair{&it->second, *value});
      } else {
        wanted.erase(key);
      }
    }
  }
  std::vector<Fill> fills;
  Region const* last_region = nullptr;
  for (auto const& [key, what] : wanted) {
    auto const& [mapping, value] = what;
    bool joined = key.first == last_region && fills.back().value == value &&
                  fills.back().address + fills.back().bytes == mapping->address();
    if (!joined) fills.push_back({.address = mapping->address(), .value = value, .handles = {}});
    last_region = key.first;
    auto& fill = fills.back();
    fill.bytes += mapping->bytes();
    fill.destroys = fill.destroys || restorable.contains(mapping->memory().get());
    fill.handles.push_back(mapping->memory().get());
  }
  std::stable_partition(fills.begin(), fills.end(),
                        [](Fill const& fill) { return !fill.destroys; });
  return fills;
}

// Gives the lock up while the device works. What the plan has freed and not mapped again is kept
// from others meanwhile, and counted as its old owner's: the way back may need it.
void Transaction::fill(Lock& lock) {
  auto fills = this->fills();
  if (fills.empty()) return;
  auto stream = arena_.fill_stream();
  std::vector<std::pair<Region*, std::shared_ptr<Allocation>>> kept;
  for (auto const& applied : applied_) {
    if (applied.step->kind == Step::Kind::kMap) continue;
    for (auto const& [offset, mapping] : applied.mappings) {
      auto memory = arena_.pool_.withdraw(*mapping.memory());
      if (!memory) continue;
      arena_.charge(*applied.step->region, memory->bytes());
      kept.emplace_back(applied.step->region.get(), std::move(memory));
    }
  }
  lock.unlock();
  auto& driver = *arena_.driver_;
  Result result = kSuccess;
  char const* call = "memset_async";
  std::size_t bytes = 0;
  for (auto const& fill : fills) {
    bytes = fill.bytes;
    result = driver.memset_async(fill.address, fill.value, fill.bytes, stream);
    if (result != kSuccess) break;
    filled_.insert(fill.handles.begin(), fill.handles.end());
  }
  if (!filled_.empty()) {
    // After a failure too: those before it are under way.
    Result drained = driver.stream_synchronize(stream);
    // The way back unmaps what is being filled, so it is worth asking twice.
    fills_unconfirmed_ = drained != kSuccess && driver.stream_synchronize(stream) != kSuccess;
    if (result == kSuccess) {
      result = drained;
      call = "stream_synchronize";
    }
  }
  lock.lock();
  for (auto& [region, memory] : kept) {
    arena_.discharge(*region, memory->bytes());
    arena_.pool_.give(std::move(memory));
  }
  if (fills_unconfirmed_) ++arena_.unconfirmed_fills_;
  aegaeon::check(driver, result, call, bytes);
}

// Read-only mappings that had to be filled first.
void Transaction::protect() {
  for (auto const& applied : applied_) {
    auto& region = *applied.step->region;
    if (!applied.step->read_only || region.wanted_access(true) != Access::kRead) continue;
    auto [begin, end] = region.mappings_in(applied.step->range);
    for_each_run(
        begin, end,
        [](Mapping const& mapping) {
          return mapping.read_only && mapping.access() != Access::kRead;
        },
        [&](auto first, auto last) {
          aegaeon::check(*arena_.driver_,
                         set_run_access(*arena_.driver_, first, last, Access::kRead),
                         "mem_set_access", applied.step->bytes);
        });
  }
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

// -- back ----------------------------------------------------------------------------------------

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
    arena_.quarantine(std::move(mapping), filling);
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
    add_range(lost_contents_, region, range);
    if (quarantine) {
      add_range(quarantined_, region, range);
      arena_.quarantine(std::move(it->second), false);
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
          return mapping.access() == Access::kNone &&
                 region.wanted_access(mapping.read_only) == access;
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
    if (filled_.contains(mapping.memory().get())) {
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
