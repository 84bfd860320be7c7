// Transaction: one commit of a plan. Everything is checked and admitted before the first driver
// call; a failure after that is undone in reverse, with the same handles at the same places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "error.hpp"
#include "vmm/arena.hpp"
#include "vmm/notices.hpp"

namespace aegaeon {

class Transaction {
 public:
  // closing: this region's address range goes too, after the steps. on_behalf_of: the alias set
  // whose regions these are; nobody else may map, unmap or close them.
  Transaction(Arena& arena, std::vector<Step> steps, std::shared_ptr<Region> closing = nullptr,
              bool abandon_views = false, AliasSet const* on_behalf_of = nullptr);
  // also: done with the plan, under the same lock: nobody sees the one without the other.
  void commit(std::function<void()> const& also = {});
  std::optional<Shortage> check();

 private:
  using Lock = std::unique_lock<std::mutex>;

  // How far a step has come.
  struct Applied {
    PlannedStep const* step;
    std::vector<Range> slots;   // of an unmap
    Slots mappings;             // map: not yet in the region; unmap: taken out of it
    HandlePool::Handles taken;  // map: not yet mapped
    bool entered = false;       // in the region's and the arena's books
  };
  struct Fill {
    Address address = 0;
    std::size_t bytes = 0;
    std::uint8_t value = 0;
    bool destroys = false;  // bytes that the way back would restore
    std::vector<Allocation const*> handles;
  };

  std::vector<PlannedStep> plan() const;
  std::vector<PlannedStep> plan_close() const;
  void prepare(Lock& lock);
  void wait_until_unchanging(Lock& lock);
  // Gives the lock up, and says whether it did: then what was checked has to be checked again.
  bool wait_for_events(Lock& lock);
  void set_changing(bool changing);
  void free_address();
  void finish();

  // carry_out.cpp
  void apply(PlannedStep const& step);
  void apply_map(Applied& applied);
  void apply_unmap(Applied& applied);
  std::optional<std::uint8_t> fill_value(PlannedStep const& step, Allocation const& memory) const;
  std::vector<Fill> fills();
  void fill(Lock& lock);
  void protect();

  // roll_back.cpp
  void roll_back();
  void undo_map(Applied& applied);
  void undo_unmap(Applied& applied);
  // Mapped by this plan: nobody's contents are lost with it.
  [[nodiscard]] bool is_own(Mapping const& mapping) const noexcept {
    return mapping.record.number >= first_number_;
  }
  [[noreturn]] void rethrow_with_losses(std::exception_ptr error) const;

  Arena& arena_;
  std::vector<Step> steps_;
  std::shared_ptr<Region> closing_;
  bool abandon_views_;
  AliasSet const* on_behalf_of_;
  std::vector<PlannedStep> planned_;
  std::vector<Applied> applied_;
  std::uint64_t first_number_ = 0;  // of the mappings that the plan makes
  Notices notices_;
  // Handles that have been submitted to be filled; unconfirmed when the device did not say that it
  // is done.
  std::set<Allocation const*> filled_;
  bool fills_unconfirmed_ = false;
  std::map<std::uint64_t, std::shared_ptr<Region::Hooks const>> ended_hooks_;  // of `closing`
  std::vector<RegionRange> quarantined_;
  std::vector<RegionRange> lost_contents_;
};

}  // namespace aegaeon
