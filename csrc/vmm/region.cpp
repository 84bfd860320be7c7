#include "vmm/region.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include "error.hpp"
#include "vmm/arena.hpp"
#include "vmm/transaction.hpp"

namespace aegaeon {
namespace {

// In order, without overlaps, neighbours as one.
std::vector<Range> joined(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](Range const& a, Range const& b) { return a.offset_bytes < b.offset_bytes; });
  std::vector<Range> joined;
  for (auto const& range : ranges) {
    if (joined.empty() || joined.back().end() < range.offset_bytes) {
      joined.push_back(range);
    } else {
      joined.back().size_bytes =
          std::max(joined.back().end(), range.end()) - joined.back().offset_bytes;
    }
  }
  return joined;
}

}  // namespace

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
  auto work = finish_work(*arena_, {this});
  Lock lock(arena_->mutex_);
  auto mappings = extract({0, size_bytes()});
  if (!work) {
    for_each_run(
        mappings.begin(), mappings.end(), [](Mapping const&) { return true; },
        [&](auto first, auto last) {
          report(unmap_run(*arena_->driver_, first, last), "mem_unmap");
        });
  }
  for (auto& [offset, mapping] : mappings) {
    arena_->discharge(*this, mapping.bytes());
    auto memory = mapping.memory();
    memory->record.region_id = id_;
    memory->record.offset = offset;
    if (mapping.mapped()) {
      arena_->quarantine_.add(std::move(mapping), false, work);
    } else {
      arena_->pool_.give(std::move(memory));
    }
  }
  mappings.clear();
  arena_->quarantine_.retire(std::move(range_));
  if (!closed_) arena_->regions_.erase(id_);
}

void Region::map(std::size_t offset_bytes, std::optional<std::size_t> size_bytes, Contents contents,
                 bool read_only) {
  arena_->commit(
      {{Step::Kind::kMap, shared_from_this(), offset_bytes, size_bytes, contents, read_only}});
}

void Region::unmap(std::size_t offset_bytes, std::optional<std::size_t> size_bytes) {
  arena_->commit({{.kind = Step::Kind::kUnmap,
                   .region = shared_from_this(),
                   .offset_bytes = offset_bytes,
                   .size_bytes = size_bytes}});
}

void Region::close(bool abandon_views) {
  Transaction(*arena_, {}, shared_from_this(), abandon_views).commit();
}

// -- access --------------------------------------------------------------------------------------

void Region::protect(std::size_t offset_bytes, std::optional<std::size_t> size_bytes,
                     bool read_only) {
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  require_open("protect");
  require_part_of(nullptr, "protect");
  auto range = checked_range("protect", offset_bytes, size_bytes);
  require_whole_slots("protect", slots_, range, size_bytes.has_value());
  auto [begin, end] = mappings_in(range);
  std::vector<bool> before;
  for (auto it = begin; it != end; ++it) {
    before.push_back(std::exchange(it->second.record.read_only, read_only));
  }
  if (Result result = settle_access(); result != kSuccess) {
    auto was = before.begin();
    for (auto it = begin; it != end; ++it) it->second.record.read_only = *was++;
    static_cast<void>(settle_access());
    check(*arena_->driver_, result, "mem_set_access", range.size_bytes);
  }
}

void Region::open_window() {
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  require_open("writable window");
  ++num_windows_;
  if (Result result = settle_access(); result != kSuccess) {
    --num_windows_;
    static_cast<void>(settle_access());
    check(*arena_->driver_, result, "mem_set_access", mapped_bytes_);
  }
}

void Region::close_window() {
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  --num_windows_;
  check(*arena_->driver_, settle_access(), "mem_set_access", mapped_bytes_);
}

Result Region::settle_access(Range const& range) noexcept {
  Result first_failure = kSuccess;
  auto [begin, end] = mappings_in(range);
  for (auto access : {Access::kReadWrite, Access::kRead}) {
    for_each_run(
        begin, end,
        [&](Mapping const& mapping) {
          return mapping.access() != access && wanted_access(mapping) == access;
        },
        [&](auto first, auto last) {
          Result result = set_run_access(*arena_->driver_, first, last, access);
          if (first_failure == kSuccess) first_failure = result;
        });
  }
  return first_failure;
}

// -- who uses it ---------------------------------------------------------------------------------

void Region::record(StreamId stream) {
  auto& driver = *arena_->driver_;
  require_no_capture(driver, stream,
                     "hold() the region while the graph exists or replays, and record the stream "
                     "after each replay");
  Lock lock(arena_->mutex_);
  require_open("record");
  auto found = recorded_.find(stream);
  auto event = found == recorded_.end() ? arena_->take_event() : found->second.event;
  Result result = driver.event_record(event->id(), stream);
  if (result != kSuccess && found == recorded_.end()) arena_->free_events_.push_back(event);
  check(driver, result, "event_record");
  recorded_[stream] = {std::move(event), arena_->next_id_++};
}

bool Region::wait_for_events(Lock& lock, std::vector<Region*> const& regions) {
  struct Awaited {
    Region* region;
    StreamId stream;
    Recorded recorded;
  };
  std::vector<Awaited> awaited;
  for (auto* region : regions) {
    for (auto const& [stream, recorded] : region->recorded_) {
      awaited.push_back({region, stream, recorded});
    }
  }
  if (awaited.empty()) return false;
  auto& arena = *regions.front()->arena_;
  lock.unlock();
  for (auto const& [region, stream, recorded] : awaited) {
    check(*arena.driver_, arena.driver_->event_synchronize(recorded.event->id()),
          "event_synchronize");
  }
  lock.lock();
  for (auto const& [region, stream, recorded] : awaited) {
    auto found = region->recorded_.find(stream);
    if (found == region->recorded_.end() || found->second.number != recorded.number) continue;
    arena.free_events_.push_back(std::move(found->second.event));
    region->recorded_.erase(found);
  }
  return true;
}

std::shared_ptr<UnfinishedWork> Region::finish_work(Arena& arena,
                                                    std::vector<Region*> const& regions) {
  Events over, unfinished;
  for (auto* region : regions) {
    for (auto& [stream, recorded] : region->recorded_) {
      Result result = arena.driver_->event_synchronize(recorded.event->id());
      report(result, "event_synchronize");
      (result == kSuccess ? over : unfinished).push_back(std::move(recorded.event));
    }
    region->recorded_.clear();
  }
  if (!over.empty()) {
    std::lock_guard lock(arena.mutex_);
    arena.free_events_.insert(arena.free_events_.end(), over.begin(), over.end());
  }
  if (unfinished.empty()) return nullptr;
  return std::make_shared<UnfinishedWork>(UnfinishedWork{std::move(unfinished)});
}

void Region::drop_events() {
  for (auto& [stream, recorded] : recorded_) {
    arena_->free_events_.push_back(std::move(recorded.event));
  }
  recorded_.clear();
}

Region::Hold::Hold(std::shared_ptr<Region> region, std::string reason)
    : region_(std::move(region)), reason_(region_->holds_.insert(std::move(reason))) {}

void Region::Hold::end() {
  auto region = std::move(region_);  // let go of unlocked: a region's end takes the mutex
  if (!region) return;
  std::lock_guard lock(region->arena_->mutex_);
  region->holds_.erase(reason_);
}

std::unique_ptr<Region::Hold> Region::hold(std::string reason) {
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  require_open("hold");
  return std::make_unique<Hold>(shared_from_this(), std::move(reason));
}

Region::Use::Use(std::shared_ptr<Region> region, std::vector<Range> written)
    : region_(std::move(region)), written_(std::move(written)) {
  ++region_->num_uses_;
  for (auto const& range : written_) {
    auto [begin, end] = region_->mappings_in(range);
    for (auto it = begin; it != end; ++it) ++it->second.record.num_writers;
  }
}

Region::Use::~Use() {
  if (!written_.empty()) {
    std::lock_guard lock(region_->arena_->mutex_);
    for (auto const& range : written_) {
      auto [begin, end] = region_->mappings_in(range);
      for (auto it = begin; it != end; ++it) --it->second.record.num_writers;
      // The window in which the transfer began may be closed by now. Nothing else: a mapping that
      // somebody is filling just now is not wanted writable.
      report(region_->settle_access(range), "mem_set_access");
    }
  }
  --region_->num_uses_;
}

std::unique_ptr<Region::Use> Region::use(std::vector<Range> const& ranges, bool writes) {
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  require_open("transfer");
  require_slot("transfer");
  std::vector<Range> written;
  for (auto const& range : ranges) {
    auto where = [&] {
      return concat("transfer on ", title(), ": [", range.offset_bytes, ", ", range.end(), ")");
    };
    if (!slots_.covers(range)) throw LifecycleError(concat(where(), " is not mapped"));
    if (!writes) continue;
    auto [begin, end] = mappings_over(range);
    for (auto it = begin; it != end; ++it) {
      auto const& mapping = it->second;
      bool locked = mapping.record.read_only && num_windows_ == 0;
      if (locked || mapping.access() != Access::kReadWrite) {
        throw LifecycleError(
            concat(where(), " is read-only; load inside `with region.writable():`"));
      }
      written.push_back({it->first, mapping.bytes()});
    }
  }
  return std::make_unique<Use>(shared_from_this(), joined(std::move(written)));
}

std::unique_ptr<Region::Export> Region::export_range(Range const& range) {
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  require_open("tensor");
  if (!slots_.covers(range)) {
    throw LifecycleError(concat("tensor over ", title(), ": [", range.offset_bytes, ", ",
                                range.end(), ") is not mapped"));
  }
  return std::make_unique<Export>(shared_from_this());
}

std::uint64_t Region::add_hooks(Hook before_unmap, Hook after_map) {
  auto hooks = std::make_shared<Hooks const>(Hooks{std::move(before_unmap), std::move(after_map)});
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  require_open("add_hooks");
  auto id = arena_->next_id_++;
  arena_->hooked_.emplace(id_, shared_from_this());
  hooks_.emplace(id, std::move(hooks));
  return id;
}

void Region::remove_hooks(std::uint64_t id) {
  std::shared_ptr<Hooks const> gone;  // they may be the last reference to what takes the mutex
  std::shared_ptr<Region> self;
  std::lock_guard lock(arena_->mutex_);
  auto found = hooks_.find(id);
  if (found == hooks_.end()) return;
  gone = std::move(found->second);
  hooks_.erase(found);
  if (!hooks_.empty()) return;
  self = std::move(arena_->hooked_.at(id_));
  arena_->hooked_.erase(id_);
}

// -- state ---------------------------------------------------------------------------------------

std::vector<Range> Region::mapped_ranges() const {
  std::lock_guard lock(arena_->mutex_);
  return slots_.runs_in({0, size_bytes()});
}

std::vector<Range> Region::read_only_ranges() const {
  std::lock_guard lock(arena_->mutex_);
  std::vector<Range> ranges;
  for (auto const& [offset, mapping] : mapped_) {
    if (!mapping.record.read_only) continue;
    if (!ranges.empty() && ranges.back().end() == offset) {
      ranges.back().size_bytes += mapping.bytes();
    } else {
      ranges.push_back({offset, mapping.bytes()});
    }
  }
  return ranges;
}

std::string Region::title() const {
  return concat("'", owner_, "' (", tag_, ")");
}

void Region::wait_for_change(Lock& lock) const {
  arena_->changed_.wait(lock, [&] { return !changing_; });
}

void Region::require_open(char const* verb) const {
  if (closed_) throw LifecycleError(concat(verb, " on ", title(), ": the region is closed"));
}

void Region::require_unused(char const* verb) const {
  if (num_uses_ != 0) {
    throw LifecycleError(concat(verb, " of ", title(), ": ", num_uses_.load(),
                                " transfer(s) on it are in flight; wait for them first"));
  }
  if (holds_.empty()) return;
  std::string reasons;
  for (auto const& reason : holds_) reasons += concat(reasons.empty() ? "" : ", ", reason);
  throw LifecycleError(concat(verb, " of ", title(), ": it is held (", reasons, ")"));
}

void Region::require_no_views(char const* verb) const {
  if (num_exports_ == 0) return;
  throw LifecycleError(concat(verb, " of ", title(), ": ", num_exports_.load(),
                              " view(s) of its memory are alive (tensors, arrays); drop them "
                              "first, or close with abandon_views"));
}

void Region::require_part_of(AliasSet const* set, char const* verb) const {
  if (alias_set_ == set) return;
  throw LifecycleError(concat(verb, " of ", title(),
                              ": it belongs to an alias set, which maps, gives and closes it"));
}

void Region::require_slot(char const* verb) const {
  if (owns_slot_) return;
  throw LifecycleError(
      concat(verb, " on ", title(), ": another owner of its alias set has the slot"));
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

// all_mapped: the range has to be mapped throughout; else something has to be.
void Region::require_whole_slots(char const* verb, SlotMap const& slots, Range const& range,
                                 bool all_mapped) const {
  for (auto edge : {range.offset_bytes, range.end()}) {
    if (auto slot = slots.cut_by(edge)) {
      throw LifecycleError(concat(verb, " of ", title(), ": offset ", edge,
                                  " is inside the handle [", slot->offset_bytes, ", ", slot->end(),
                                  "); memory goes only by whole handles"));
    }
  }
  if (all_mapped && !slots.covers(range)) {
    throw LifecycleError(concat(verb, " of ", title(), ": [", range.offset_bytes, ", ", range.end(),
                                ") is not mapped, or only in part"));
  }
  if (!slots.first_overlap(range)) {
    throw LifecycleError(concat(verb, " of ", title(), ": nothing is mapped from offset ",
                                range.offset_bytes, " on"));
  }
}

// Large slots lie at multiples of their size, so every such multiple is a place to cut at; heads
// and tails are slots of the granularity.
std::vector<Range> Region::slots_for(Range const& range) const {
  auto large = arena_->handle_bytes_;
  auto small = arena_->driver_->granularity_bytes();
  std::vector<Range> slots;
  for (auto offset = range.offset_bytes; offset < range.end();) {
    auto bytes = offset % large == 0 && range.end() - offset >= large ? large : small;
    slots.push_back({offset, bytes});
    offset += bytes;
  }
  return slots;
}

std::pair<Slots::iterator, Slots::iterator> Region::mappings_in(Range const& range) {
  return {mapped_.lower_bound(range.offset_bytes), mapped_.lower_bound(range.end())};
}

std::pair<Slots::iterator, Slots::iterator> Region::mappings_over(Range const& range) {
  auto [begin, end] = mappings_in(range);
  if (begin != mapped_.begin()) {
    auto before = std::prev(begin);
    if (before->first + before->second.bytes() > range.offset_bytes) begin = before;
  }
  return {begin, end};
}

Slots Region::extract(Range const& range) {
  Slots out;
  auto [it, end] = mappings_in(range);
  while (it != end) out.insert(out.end(), mapped_.extract(it++));
  return out;
}

}  // namespace aegaeon
