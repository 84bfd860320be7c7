#include "vmm/shared_region.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "error.hpp"
#include "vmm/arena.hpp"
#include "vmm/region.hpp"

namespace aegaeon {
namespace {

std::shared_ptr<Reservation> reserve_for(std::shared_ptr<Driver> const& driver,
                                         std::size_t size_bytes,
                                         std::vector<SharedHandle> const& handles) {
  auto granularity = driver->granularity_bytes();
  auto alignment = granularity;  // like the largest handle, for the sake of the driver's pages
  std::size_t reached = 0;
  for (auto const& handle : handles) {
    auto [fd, offset, bytes] = handle;
    bool fits = offset >= reached && offset <= size_bytes && bytes <= size_bytes - offset;
    if (!fits || bytes == 0 || offset % granularity != 0 || bytes % granularity != 0) {
      throw std::invalid_argument(concat("a shared handle of ", bytes, " bytes at ", offset,
                                         " does not fit in a region of ", size_bytes,
                                         " bytes, after ", reached, ", in steps of ", granularity));
    }
    reached = offset + bytes;
    if (std::has_single_bit(bytes)) alignment = std::max(alignment, bytes);
  }
  if (handles.empty() || size_bytes % granularity != 0) {
    throw std::invalid_argument(
        concat("a shared region of ", size_bytes, " bytes with ", handles.size(), " handles"));
  }
  return std::make_shared<Reservation>(driver, size_bytes, alignment);
}

}  // namespace

std::vector<SharedHandle> Region::export_handles() {
  Lock lock(arena_->mutex_);
  wait_for_change(lock);
  require_open("export_handles");
  require_slot("export_handles");
  if (!arena_->pool_.exportable()) {
    throw std::invalid_argument(
        concat("export_handles of ", title(), ": make its arena with exportable=True"));
  }
  if (mapped_.empty()) {
    throw LifecycleError(concat("export_handles of ", title(), ": nothing is mapped"));
  }
  std::vector<SharedHandle> handles;
  handles.reserve(mapped_.size());
  for (auto const& [offset, mapping] : mapped_) {
    int fd = -1;
    Result result = arena_->driver_->mem_export(&fd, mapping.memory()->handle());
    if (result != kSuccess) {
      for (auto const& handle : handles) ::close(handle.fd);
      check(*arena_->driver_, result, "mem_export", mapping.bytes());
    }
    handles.push_back({fd, offset, mapping.bytes()});
  }
  return handles;
}

SharedRegion::SharedRegion(std::shared_ptr<Driver> driver, std::size_t size_bytes,
                           std::vector<SharedHandle> const& handles, bool read_only)
    : driver_(std::move(driver)),
      read_only_(read_only),
      range_(reserve_for(driver_, size_bytes, handles)) {
  for (auto const& handle : handles) {
    auto memory = std::make_shared<Allocation>(driver_, handle);
    mapped_.try_emplace(handle.offset_bytes, driver_, range_, handle.offset_bytes,
                        std::move(memory));
    slots_.add({handle.offset_bytes, handle.size_bytes});
  }
  Result result = kSuccess;
  for_each_run(
      mapped_.begin(), mapped_.end(), [](Mapping const&) { return true; },
      [&](auto first, auto last) {
        if (result != kSuccess) return;
        result =
            set_run_access(*driver_, first, last, read_only_ ? Access::kRead : Access::kReadWrite);
      });
  check(*driver_, result, "mem_set_access", size_bytes);
}

SharedRegion::~SharedRegion() {
  report(unmap(), "mem_unmap");
}

// The first failure; the other runs are still tried.
Result SharedRegion::unmap() noexcept {
  Result first_failure = kSuccess;
  for_each_run(
      mapped_.begin(), mapped_.end(), [](Mapping const& mapping) { return mapping.mapped(); },
      [&](auto first, auto last) {
        Result result = unmap_run(*driver_, first, last);
        if (first_failure == kSuccess) first_failure = result;
      });
  return first_failure;
}

void SharedRegion::close(bool abandon_views) {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  if (num_exports_ != 0 && !abandon_views) {
    throw LifecycleError(concat("close of a shared region: ", num_exports_.load(),
                                " view(s) of its memory are alive (tensors, arrays); drop them "
                                "first, or close with abandon_views"));
  }
  slots_ = {};  // no new views of what may be gone
  check(*driver_, unmap(), "mem_unmap", size_bytes());
  mapped_.clear();
  if (num_exports_ == 0) check(*driver_, range_->free(), "address_free", size_bytes());
  closed_ = true;
}

std::shared_ptr<void> SharedRegion::export_range(Range const& range) {
  std::lock_guard lock(mutex_);
  if (closed_) throw LifecycleError("view of a shared region: it is closed");
  if (!slots_.covers(range)) {
    throw LifecycleError(concat("view of a shared region: [", range.offset_bytes, ", ", range.end(),
                                ") is not mapped"));
  }
  ++num_exports_;
  return {static_cast<void*>(this), [self = shared_from_this()](void*) { --self->num_exports_; }};
}

std::vector<Range> SharedRegion::mapped_ranges() const {
  std::lock_guard lock(mutex_);
  return slots_.runs_in({0, size_bytes()});
}

}  // namespace aegaeon
