// SharedRegion: memory of a region of another process, at an address of this one. Thread-safe.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "driver/driver.hpp"
#include "vmm/handles.hpp"
#include "vmm/shared_handle.hpp"
#include "vmm/slot_map.hpp"

namespace aegaeon {

class SharedRegion : public std::enable_shared_from_this<SharedRegion> {
 public:
  // All of it is mapped, or nothing. The descriptors stay the caller's. Throws
  // std::invalid_argument: the handles do not lie one after another inside the region.
  SharedRegion(std::shared_ptr<Driver> driver, std::size_t size_bytes,
               std::vector<SharedHandle> const& handles, bool read_only);
  ~SharedRegion();
  SharedRegion(SharedRegion const&) = delete;  // owns an address range
  SharedRegion& operator=(SharedRegion const&) = delete;

  // Unmaps; the address range goes with the last view. What a failure leaves mapped stays, and it
  // may be called again. Throws LifecycleError while there are views, unless told to abandon them.
  void close(bool abandon_views);

  // While what this returns lives, it cannot be closed, and if it is, the address stays reserved.
  std::shared_ptr<void> export_range(Range const& range);
  [[nodiscard]] std::vector<Range> mapped_ranges() const;

  [[nodiscard]] std::shared_ptr<Driver> const& driver() const noexcept { return driver_; }
  [[nodiscard]] Address address() const noexcept { return range_->address(); }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return range_->bytes(); }
  [[nodiscard]] bool read_only() const noexcept { return read_only_; }
  [[nodiscard]] bool closed() const noexcept { return closed_; }

 private:
  Result unmap() noexcept;

  std::shared_ptr<Driver> const driver_;
  bool const read_only_;
  std::shared_ptr<Reservation> range_;
  mutable std::mutex mutex_;  // guards all that follows
  SlotMap slots_;
  Slots mapped_;
  std::atomic<std::size_t> num_exports_{0};
  std::atomic<bool> closed_{false};
};

}  // namespace aegaeon
