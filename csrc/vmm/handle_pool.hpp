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

#include "driver/driver.hpp"
#include "vmm/handles.hpp"

namespace aegaeon {

// Where a free handle was mapped last.
struct LastUse {
  std::uint64_t region_id = 0;
  std::size_t offset = 0;
};

struct HandlePoolStats {
  std::size_t created_bytes = 0;  // of all handles that exist, whoever has them
  std::size_t num_handles = 0;    // of the large size
  std::size_t num_tail_handles = 0;
  std::size_t num_free_handles = 0;
  std::size_t num_free_tail_handles = 0;
  std::uint64_t total_created = 0;
  std::uint64_t total_released = 0;
  std::uint64_t total_converted = 0;  // released only to make room for the other size
};

// Two sizes: handle_bytes, and the driver's granularity for heads and tails. Not thread-safe: the
// arena's mutex guards it.
class HandlePool {
 public:
  HandlePool(std::shared_ptr<Driver> driver, std::size_t capacity_bytes, std::size_t handle_bytes);

  // A handle of that size: free ones first, of those the ones this region used last; then a new
  // one; then, when the capacity is spent, one in place of free handles of the other size. The
  // caller has made sure that so many bytes are free. Throws DriverError, OutOfMemory.
  std::shared_ptr<Allocation> take(std::size_t bytes, LastUse wanted);
  void give(std::shared_ptr<Allocation> memory, LastUse last);
  // Releases all free handles. Throws DriverError; those it could not release stay.
  void release_free();
  [[nodiscard]] HandlePoolStats stats() const noexcept;

 private:
  struct Free {
    std::shared_ptr<Allocation> memory;
    LastUse last;
  };
  struct FreeHandles {
    std::map<std::uint64_t, Free> by_age;                                    // oldest first
    std::set<std::tuple<std::uint64_t, std::size_t, std::uint64_t>> by_use;  // region, offset, age
  };

  [[nodiscard]] std::size_t size_index(std::size_t bytes) const noexcept {
    return bytes == handle_bytes_ ? 0 : 1;
  }
  static std::shared_ptr<Allocation> remove(FreeHandles& from, std::uint64_t age);
  void release_oldest(FreeHandles& from);

  std::shared_ptr<Driver> driver_;
  std::size_t capacity_;
  std::size_t handle_bytes_;
  std::array<FreeHandles, 2> free_;
  std::array<std::size_t, 2> num_handles_{};
  std::size_t created_bytes_ = 0;
  std::uint64_t next_age_ = 1;
  std::uint64_t total_created_ = 0;
  std::uint64_t total_released_ = 0;
  std::uint64_t total_converted_ = 0;
};

}  // namespace aegaeon
