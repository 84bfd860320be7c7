#include "vmm/handles.hpp"

#include <utility>

#include "error.hpp"

namespace aegaeon {

Allocation::Allocation(std::shared_ptr<Driver> driver, std::size_t bytes)
    : driver_(std::move(driver)), bytes_(bytes) {
  check(*driver_, driver_->mem_create(&handle_, bytes, false), "mem_create", bytes);
  live_ = true;
}

Allocation::~Allocation() {
  report(release(), "mem_release");
}

Result Allocation::release() noexcept {
  if (!live_) return kSuccess;
  Result result = driver_->mem_release(handle_);
  live_ = result != kSuccess;
  return result;
}

Reservation::Reservation(std::shared_ptr<Driver> driver, std::size_t bytes, std::size_t alignment)
    : driver_(std::move(driver)), bytes_(bytes) {
  check(*driver_, driver_->address_reserve(&address_, bytes, alignment), "address_reserve", bytes);
  live_ = true;
}

Reservation::~Reservation() {
  report(free(), "address_free");
}

Result Reservation::free() noexcept {
  if (!live_) return kSuccess;
  Result result = driver_->address_free(address_, bytes_);
  live_ = result != kSuccess;
  return result;
}

Mapping::Mapping(std::shared_ptr<Driver> driver, std::shared_ptr<Reservation> range,
                 std::size_t offset, std::shared_ptr<Allocation> memory)
    : driver_(std::move(driver)),
      memory_(std::move(memory)),
      range_(std::move(range)),
      offset_(offset) {
  check(*driver_, map(), "mem_map", bytes());
}

Mapping::~Mapping() {
  if (mapped_) report(unmap(), "mem_unmap");
}

Mapping::Mapping(Mapping&& other) noexcept
    : driver_(std::move(other.driver_)),
      memory_(std::move(other.memory_)),
      range_(std::move(other.range_)),
      offset_(other.offset_),
      mapped_(std::exchange(other.mapped_, false)) {}

Result Mapping::map() noexcept {
  Result result = driver_->mem_map(address(), bytes(), 0, memory_->handle());
  mapped_ = mapped_ || result == kSuccess;
  return result;
}

Result Mapping::unmap() noexcept {
  Result result = driver_->mem_unmap(address(), bytes());
  mapped_ = mapped_ && result != kSuccess;
  return result;
}

namespace {

Address begin_of(Slots const& run) {
  return run.begin()->second.address();
}

std::size_t bytes_of(Slots const& run) {
  auto const& last = run.rbegin()->second;
  return last.address() + last.bytes() - begin_of(run);
}

}  // namespace

Result set_run_access(Driver& driver, Slots const& run) noexcept {
  return driver.mem_set_access(begin_of(run), bytes_of(run), Access::kReadWrite);
}

Result unmap_run(Driver& driver, Slots& run) noexcept {
  Result result = driver.mem_unmap(begin_of(run), bytes_of(run));
  if (result == kSuccess) {
    for (auto& [offset, mapping] : run) mapping.mark_unmapped();
  }
  return result;
}

Result restore_run(Driver& driver, Slots& run) noexcept {
  Result result = kSuccess;
  for (auto it = run.begin(); it != run.end() && result == kSuccess; ++it) {
    result = it->second.map();
  }
  if (result == kSuccess) result = set_run_access(driver, run);
  if (result != kSuccess) {
    for (auto& [offset, mapping] : run) {
      // What stays mapped is for the caller to see, by mapped().
      if (mapping.mapped()) static_cast<void>(mapping.unmap());
    }
  }
  return result;
}

}  // namespace aegaeon
