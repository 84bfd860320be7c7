#include "vmm/notices.hpp"

#include <algorithm>
#include <utility>

namespace aegaeon {
namespace {

// The regions of the steps of that kind, each once, in their order.
std::vector<std::shared_ptr<Region>> regions_of(std::vector<PlannedStep> const& planned,
                                                Step::Kind kind) {
  std::vector<std::shared_ptr<Region>> regions;
  for (auto const& step : planned) {
    if (step.kind != kind) continue;
    if (std::find(regions.begin(), regions.end(), step.region) != regions.end()) continue;
    regions.push_back(step.region);
  }
  return regions;
}

}  // namespace

// For every hook of the region, a call for each run of mappings that wanted(hook id, mapping)
// names.
template <typename Wanted>
void Notices::add_calls(std::vector<Call>& calls, std::shared_ptr<Region> const& region,
                        Wanted wanted) {
  for (auto const& [id, hooks] : region->hooks_) {
    for_each_run(
        region->mapped_.begin(), region->mapped_.end(),
        [&](Mapping const& mapping) { return wanted(id, mapping); },
        [&](auto first, auto last) {
          auto& call = calls.emplace_back(Call{region, id, hooks, {first->first, 0}, {}});
          for (auto it = first; it != last; ++it) {
            call.range.size_bytes += it->second.bytes();
            call.numbers.push_back(it->second.record.number);
          }
        });
  }
}

std::vector<Notices::Call> Notices::untold(std::vector<PlannedStep> const& planned) const {
  std::vector<Call> calls;
  for (auto const& region : regions_of(planned, Step::Kind::kUnmap)) {
    if (region->hooks_.empty()) continue;
    std::set<std::uint64_t> going;
    for (auto const& step : planned) {
      if (step.kind != Step::Kind::kUnmap || step.region != region) continue;
      auto [begin, end] = region->mappings_in(step.range);
      for (auto it = begin; it != end; ++it) going.insert(it->second.record.number);
    }
    add_calls(calls, region, [&](std::uint64_t id, Mapping const& mapping) {
      auto number = mapping.record.number;
      return going.contains(number) && !told_.contains({region.get(), id, number});
    });
  }
  return calls;
}

bool Notices::tell_before(std::unique_lock<std::mutex>& lock,
                          std::vector<PlannedStep> const& planned) {
  bool told = false;
  // One call at a time: while a hook runs, what the others have to hear may change.
  for (auto calls = untold(planned); !calls.empty(); calls = untold(planned)) {
    auto& call = calls.front();
    told = true;
    lock.unlock();
    if (call.hooks->before_unmap) call.hooks->before_unmap(call.range);
    Region const* region = call.region.get();  // the plan has it too
    auto id = call.hook_id;
    auto numbers = std::move(call.numbers);
    // Hooks that have been removed meanwhile end here; what they hold may take the mutex then.
    calls.clear();
    lock.lock();
    for (auto number : numbers) told_.emplace(region, id, number);
  }
  return told;
}

std::vector<Notices::Call> Notices::after_success(std::vector<PlannedStep> const& planned,
                                                  std::uint64_t first_number) {
  std::vector<Call> calls;
  for (auto const& region : regions_of(planned, Step::Kind::kMap)) {
    add_calls(calls, region, [&](std::uint64_t, Mapping const& mapping) {
      return mapping.record.number >= first_number;
    });
  }
  return calls;
}

std::vector<Notices::Call> Notices::after_failure(std::vector<PlannedStep> const& planned) const {
  std::vector<Call> calls;
  for (auto const& region : regions_of(planned, Step::Kind::kUnmap)) {
    add_calls(calls, region, [&](std::uint64_t id, Mapping const& mapping) {
      return told_.contains({region.get(), id, mapping.record.number});
    });
  }
  return calls;
}

std::exception_ptr Notices::tell_after(std::vector<Call> const& calls) {
  std::exception_ptr first;
  for (auto const& call : calls) {
    if (!call.hooks->after_map) continue;
    try {
      call.hooks->after_map(call.range);
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  }
  return first;
}

}  // namespace aegaeon
