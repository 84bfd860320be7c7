// HostPool: host memory that is made and pinned once, for images that come and go.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transfer/free_list.hpp"
#include "transfer/host_memory.hpp"

namespace aegaeon {

struct HostPoolStats {
  std::size_t capacity_bytes = 0;
  std::size_t free_bytes = 0;
  std::size_t largest_free_bytes = 0;
  std::size_t num_free_parts = 0;
  std::map<std::string, std::size_t> holders;  // by name; of one name all together
};

class HostPool : public std::enable_shared_from_this<HostPool> {
 public:
  // Layers of an image start at multiples of this; so do the images.
  static constexpr std::size_t kAlignmentBytes = std::size_t{64} << 10;

  // All the system's work is done here: pages touched, locked. The capacity is rounded up.
  HostPool(std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
           HostMemoryOptions const& options);

  // Zeroed memory; bookkeeping, and clearing what was used before. Back in the pool when nothing
  // keeps it any more. Throws OutOfMemory that says who holds what, LifecycleError when closed.
  HostMemory allocate(std::size_t bytes, std::string const& holder);

  [[nodiscard]] HostPoolStats stats() const;
  [[nodiscard]] std::shared_ptr<Driver> const& driver() const noexcept { return driver_; }
  [[nodiscard]] bool pinned() const noexcept { return pinned_; }
  // The kinds of memory tried, the last of which it is made of.
  [[nodiscard]] std::vector<HostMemoryAttempt> const& attempts() const noexcept {
    return attempts_;
  }
  // Gives the memory back to the system. Throws LifecycleError while some of it is in use.
  void close();

 private:
  class Part;
  [[nodiscard]] std::string describe_holders() const;
  void free(std::size_t offset, std::size_t bytes, std::string const& holder) noexcept;

  std::shared_ptr<Driver> const driver_;
  std::size_t const capacity_bytes_;
  std::size_t const num_threads_;
  std::vector<HostMemoryAttempt> attempts_;
  bool pinned_ = false;
  mutable std::mutex mutex_;  // guards all that follows
  HostMemory memory_;         // without data once closed
  FreeList free_;
  std::vector<bool> used_before_;  // by kAlignmentBytes
  std::map<std::string, std::size_t> holders_;
};

}  // namespace aegaeon
