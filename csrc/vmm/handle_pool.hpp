// HandlePool: physical memory as handles that are made once and then change hands. Creating a
// handle is the dear driver call; taking one from here costs none.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <tuple>
#include <vector>

#include "driver/driver.hpp"
#include "vmm/handles.hpp"

namespace aegaeon {

struct HandlePoolStats {
  std::size_t created_bytes = 0;  // of all handles that exist, whoever has them
  std::size_t num_handles = 0;    // of the large size
  std::size_t num_tail_handles = 0;
  std::size_t num_free_handles = 0;
  std::size_t num_free_tail_handles = 0;
  std::uint64_t total_created = 0;
  std::uint64_t total_released = 0;
  std::uint64_t total_converted = 0;  // released only to make room for small ones
};

// Two sizes: handle_bytes, and the driver's granularity for heads and tails. A large slot may be
// filled by a run of small handles, so only a tail that finds no small one converts a large handle,
// and small ones stay small: there are at most capacity / handle_bytes conversions in an arena's
// life, and as many as the most tails at one time in practice. Not thread-safe: the arena's mutex
// guards it.
class HandlePool {
 public:
  using Handles = std::vector<std::shared_ptr<Allocation>>;

  HandlePool(std::shared_ptr<Driver> driver, std::size_t capacity_bytes, std::size_t handle_bytes,
             bool exportable);

  // Appends handles that fill a slot of that size of the region, in order of address: free ones of
  // the size, of those the ones this region used last; then a new one; then free and new small
  // ones; for a small slot one that is made in place of a free large handle. The caller has made
  // sure that so many bytes are free. Throws DriverError, OutOfMemory; what was appended stays.
  void take(std::size_t slot_bytes, std::uint64_t region_id, std::size_t offset, Handles& taken);
  void give(std::shared_ptr<Allocation> memory);
  // Out of the pool again, if it is there.
  std::shared_ptr<Allocation> withdraw(Allocation const& memory);
  // Releases all free handles. Throws DriverError; those it could not release stay.
  void release_free();
  [[nodiscard]] HandlePoolStats stats() const noexcept;
  [[nodiscard]] bool exportable() const noexcept { return exportable_; }

 private:
  struct FreeHandles {
    std::map<std::uint64_t, std::shared_ptr<Allocation>> by_age;             // oldest first
    std::set<std::tuple<std::uint64_t, std::size_t, std::uint64_t>> by_use;  // region, offset, age
  };

  [[nodiscard]] std::size_t size_index(std::size_t bytes) const noexcept {
    return bytes == handle_bytes_ ? 0 : 1;
  }
  [[nodiscard]] std::size_t room() const noexcept { return capacity_ - created_bytes_; }
  static std::shared_ptr<Allocation> remove(FreeHandles& from, std::uint64_t age);
  static std::shared_ptr<Allocation> take_free(FreeHandles& from, std::uint64_t region_id,
                                               std::size_t offset);
  std::shared_ptr<Allocation> create(std::size_t bytes);
  void release_oldest(FreeHandles& from);

  std::shared_ptr<Driver> driver_;
  std::size_t capacity_;
  std::size_t handle_bytes_;
  std::size_t small_bytes_;
  bool exportable_;
  std::array<FreeHandles, 2> free_;
  std::array<std::size_t, 2> num_handles_{};
  std::size_t created_bytes_ = 0;
  std::uint64_t next_age_ = 1;
  std::uint64_t total_created_ = 0;
  std::uint64_t total_released_ = 0;
  std::uint64_t total_converted_ = 0;
};

}  // namespace aegaeon
