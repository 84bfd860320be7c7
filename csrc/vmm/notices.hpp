// Notices: what the hooks of regions have been told. A hook hears of each mapping's going once,
// however many steps touch it, and of its coming or staying once.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#include "vmm/region.hpp"
#include "vmm/step.hpp"

namespace aegaeon {

class Notices {
 public:
  // Of one pair of hooks, about a run of mappings.
  struct Call {
    std::shared_ptr<Region> region;
    std::uint64_t hook_id = 0;
    std::shared_ptr<Region::Hooks const> hooks;
    Range range;
    std::vector<std::uint64_t> numbers;  // of the mappings
  };

  // Calls before_unmap for what the steps take away and has not been told yet. Gives the lock up
  // and says whether it did; throws what a hook throws, without the lock.
  bool tell_before(std::unique_lock<std::mutex>& lock, std::vector<PlannedStep> const& planned);

  // What after_map has to be told, by tell_after() and without a lock. The mappings with that
  // number or a later one are the plan's own.
  static std::vector<Call> after_success(std::vector<PlannedStep> const& planned,
                                         std::uint64_t first_number);
  // What has been told that it goes, and stays.
  [[nodiscard]] std::vector<Call> after_failure(std::vector<PlannedStep> const& planned) const;
  // All of them are called; the first error.
  static std::exception_ptr tell_after(std::vector<Call> const& calls);

 private:
  template <typename Wanted>
  static void add_calls(std::vector<Call>& calls, std::shared_ptr<Region> const& region,
                        Wanted wanted);
  [[nodiscard]] std::vector<Call> untold(std::vector<PlannedStep> const& planned) const;

  std::set<std::tuple<Region const*, std::uint64_t, std::uint64_t>> told_;  // hook, mapping number
};

}  // namespace aegaeon
