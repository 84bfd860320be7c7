#include "vmm/handles.hpp"

#include <utility>

#include "error.hpp"

namespace aegaeon {

Allocation::Allocation(std::shared_ptr<Driver> driver, std::size_t bytes, bool exportable)
    : driver_(std::move(driver)), bytes_(bytes) {
  check(*driver_, driver_->mem_create(&handle_, bytes, exportable), "mem_create", bytes);
  live_ = true;
}

Allocation::Allocation(std::shared_ptr<Driver> driver, SharedHandle const& shared)
    : driver_(std::move(driver)), bytes_(shared.size_bytes) {
  check(*driver_, driver_->mem_import(&handle_, shared.fd, bytes_), "mem_import", bytes_);
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
    : record(other.record),
      driver_(std::move(other.driver_)),
      memory_(std::move(other.memory_)),
      range_(std::move(other.range_)),
      offset_(other.offset_),
      mapped_(std::exchange(other.mapped_, false)),
      access_(other.access_) {}

Result Mapping::map() noexcept {
  Result result = driver_->mem_map(address(), bytes(), 0, memory_->handle());
  mapped_ = mapped_ || result == kSuccess;
  return result;
}

Result Mapping::unmap() noexcept {
  Result result = driver_->mem_unmap(address(), bytes());
  if (result == kSuccess) mark_unmapped();
  return result;
}

Result Mapping::set_access(Access access) noexcept {
  Result result = driver_->mem_set_access(address(), bytes(), access);
  if (result == kSuccess) access_ = access;
  return result;
}

void Mapping::mark_unmapped() noexcept {
  mapped_ = false;
  access_ = Access::kNone;
}

namespace {

std::size_t bytes_of(Slots::iterator begin, Slots::iterator end) {
  auto const& last = std::prev(end)->second;
  return last.address() + last.bytes() - begin->second.address();
}

}  // namespace

Result set_run_access(Driver& driver, Slots::iterator begin, Slots::iterator end,
                      Access access) noexcept {
  Result result = driver.mem_set_access(begin->second.address(), bytes_of(begin, end), access);
  if (result == kSuccess) {
    for (auto it = begin; it != end; ++it) it->second.mark_access(access);
  }
  return result;
}

Result unmap_run(Driver& driver, Slots::iterator begin, Slots::iterator end) noexcept {
  Result result = driver.mem_unmap(begin->second.address(), bytes_of(begin, end));
  if (result == kSuccess) {
    for (auto it = begin; it != end; ++it) it->second.mark_unmapped();
  }
  return result;
}

}  // namespace aegaeon
