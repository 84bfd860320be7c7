// AliasSet: regions of equal size that share one slot of memory, each at its own address, so that
// the slot changes its owner without a driver call. All public members are safe to call from any
// thread.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "vmm/arena.hpp"
#include "vmm/notices.hpp"

namespace aegaeon {

class AliasSet : public std::enable_shared_from_this<AliasSet> {
 public:
  // A region for each owner; the slot belongs to the first. debug: only the owner's region is
  // mapped. All or nothing. Throws std::invalid_argument, LifecycleError, OutOfMemory, DriverError.
  static std::shared_ptr<AliasSet> create(std::shared_ptr<Arena> arena, std::size_t slot_bytes,
                                          std::vector<std::string> const& owners,
                                          std::string const& tag, bool debug);
  explicit AliasSet(std::shared_ptr<Arena> arena, bool debug);  // by create()
  ~AliasSet();
  AliasSet(AliasSet const&) = delete;  // owns the slot
  AliasSet& operator=(AliasSet const&) = delete;

  // It keeps the set, and so what is mapped at it.
  std::shared_ptr<Region> region(std::string const& owner);
  [[nodiscard]] std::string owner() const;
  // The slot is that owner's from now on, or nothing has changed. Waits for what the old owner has
  // recorded. Throws std::invalid_argument, LifecycleError (closed; the old owner's region is held
  // or in use), OutOfMemory (the owner's maximum), DriverError, which says whether the old owner's
  // bytes are lost.
  void give(std::string const& owner, Contents contents);
  // Unmaps and frees all. After a failure nothing can be given any more, and it may be called
  // again. Views: see Region::close.
  void close(bool abandon_views);

 private:
  using Lock = std::unique_lock<std::mutex>;

  void build(std::size_t slot_bytes, std::vector<std::string> const& owners,
             std::string const& tag);
  void map_at_all();
  std::shared_ptr<Region> shared(std::size_t idx);
  [[nodiscard]] std::size_t index_of(std::string const& owner) const;
  void hand_over(Lock& lock, std::size_t to_idx, Contents contents);
  // These give the lock up.
  void fill(Lock& lock, Region& from, Region& to, std::uint8_t value);
  void confirm_fill(Lock& lock);
  bool tell_before_unmap(Lock& lock, std::vector<std::shared_ptr<Region>> const& regions);
  void unmap_aliases();

  std::shared_ptr<Arena> const arena_;
  bool const debug_;
  std::mutex turn_;  // one give() or close() at a time; taken before the arena's mutex
  // Guarded by the arena's mutex, but for what build() does before anybody knows of the set.
  std::vector<std::unique_ptr<Region>> members_;
  std::size_t owner_idx_ = 0;
  bool counted_ = false;           // among the arena's open sets
  bool closing_ = false;           // nothing is given any more
  bool fill_unconfirmed_ = false;  // a fill that nobody could wait for may still write
  Notices notices_;
};

}  // namespace aegaeon
