// Arena: the physical pool of one device, its owners and budgets. All public members are safe to
// call from any thread.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "driver/driver.hpp"
#include "driver/stream.hpp"
#include "vmm/handle_pool.hpp"
#include "vmm/handles.hpp"
#include "vmm/quarantine.hpp"
#include "vmm/region.hpp"
#include "vmm/shortage.hpp"
#include "vmm/step.hpp"

namespace aegaeon {

// Sum of owned bytes + free_bytes + quarantined_bytes == capacity_bytes, always.
struct ArenaStats {
  std::map<Holder, std::size_t> owners;  // mapped bytes
  std::size_t capacity_bytes = 0;
  std::size_t free_bytes = 0;
  std::size_t quarantined_bytes = 0;
  std::size_t handle_bytes = 0;
  std::size_t num_regions = 0;
  HandlePoolStats pool;
};

class AliasSet;

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  // handle_bytes: none chooses a power of two near capacity / 256, from the granularity to 128 MiB.
  // poison: see Contents; whatever is not zeroed when it is mapped is poisoned.
  // exportable: other processes may map the memory of its regions.
  Arena(std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
        std::optional<std::size_t> handle_bytes, bool poison = false, bool exportable = false);
  ~Arena();
  Arena(Arena const&) = delete;  // owns physical memory
  Arena& operator=(Arena const&) = delete;

  std::shared_ptr<Region> reserve(std::size_t size_bytes, std::string owner, std::string tag);
  // All steps, in order, or none. Throws std::invalid_argument, LifecycleError, OutOfMemory before
  // any driver call; DriverError when one fails, with what the way back could not restore.
  void commit(std::vector<Step> steps);
  // Whether the budget admits the plan; throws what commit() would throw before that.
  std::optional<Shortage> check(std::vector<Step> steps);
  // pinned: never proposed for eviction.
  void set_limit(std::string const& owner, std::size_t min_bytes,
                 std::optional<std::size_t> max_bytes, bool pinned = false);
  [[nodiscard]] ArenaStats stats() const;
  // Closes the regions, then releases the handles. On failure those closed so far stay closed, and
  // it may be called again. Views: see Region::close.
  void close(bool abandon_views = false);

  [[nodiscard]] std::shared_ptr<Driver> const& driver() const noexcept { return driver_; }
  [[nodiscard]] std::size_t capacity_bytes() const noexcept { return capacity_; }
  [[nodiscard]] std::size_t handle_bytes() const noexcept { return handle_bytes_; }

 private:
  friend class AliasSet;
  friend class Region;
  friend class Transaction;
  using Lock = std::unique_lock<std::mutex>;

  struct Limit {
    std::size_t min_bytes = 0;
    std::optional<std::size_t> max_bytes;
    bool pinned = false;
  };
  std::unique_ptr<Region> make_region(std::size_t size_bytes, std::string owner, std::string tag);

  // All that follow: the mutex is held, but for those that take the lock and give it up.
  // What the budget lacks for the plan, by simulating the ledger step by step.
  [[nodiscard]] std::optional<Shortage> shortage(std::vector<PlannedStep> const& plan) const;
  void find_evictable(std::vector<PlannedStep> const& plan, Shortage& shortage) const;
  [[nodiscard]] std::map<std::string, std::size_t> bytes_by_owner() const;
  void charge(Region const& region, std::size_t bytes);
  void discharge(Region const& region, std::size_t bytes) noexcept;
  [[nodiscard]] std::size_t free_bytes() const noexcept;
  [[nodiscard]] std::string holders() const;
  void confirm_fills(Lock& lock);
  void wait_for_quarantined(Lock& lock);
  StreamId fill_stream();
  std::shared_ptr<Event> take_event();

  std::shared_ptr<Driver> const driver_;
  std::size_t const capacity_;
  std::size_t const handle_bytes_;
  bool const poison_;
  mutable std::mutex mutex_;         // guards all that follows, and the state of every region
  std::condition_variable changed_;  // a region is no longer changing
  bool closed_ = false;
  std::size_t owned_ = 0;
  std::map<Holder, std::size_t> ledger_;
  std::map<std::string, Limit> limits_;
  std::map<std::uint64_t, Region*> regions_;                 // each takes itself out before it ends
  std::map<std::uint64_t, std::shared_ptr<Region>> hooked_;  // kept alive by their hooks
  std::uint64_t next_id_ = 1;
  HandlePool pool_;
  Events free_events_;
  Quarantine quarantine_;
  std::size_t num_alias_sets_ = 0;       // open ones
  std::uint64_t unconfirmed_fills_ = 0;  // counts the failures to wait for them; 0: none left
  std::unique_ptr<Stream> fill_stream_;  // last: its end waits for fills of what is above
};

}  // namespace aegaeon
