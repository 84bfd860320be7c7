// Transaction, forwards: a plan that has been admitted is carried out step by step, then filled.
#include <algorithm>
#include <utility>

#include "vmm/transaction.hpp"

namespace aegaeon {
namespace {

bool promises_zeros(Driver const& driver) {
  return driver.kind() == DeviceKind::kHost;  // a memfd; cuda.h promises nothing
}

}  // namespace

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
    placed->second.record = {.read_only = step.read_only, .number = arena_.next_id_++};
    is_filled = is_filled || fill_value(step, *memory);
    offset += memory->bytes();
  }
  auto access =
      is_filled ? Access::kReadWrite : region.wanted_access(applied.mappings.begin()->second);
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
    if (!applied.step->read_only) continue;
    auto [begin, end] = region.mappings_in(applied.step->range);
    for_each_run(
        begin, end,
        [&](Mapping const& mapping) {
          return region.wanted_access(mapping) == Access::kRead &&
                 mapping.access() != Access::kRead;
        },
        [&](auto first, auto last) {
          aegaeon::check(*arena_.driver_,
                         set_run_access(*arena_.driver_, first, last, Access::kRead),
                         "mem_set_access", applied.step->bytes);
        });
  }
}

}  // namespace aegaeon
