// Owners of driver objects. Each knows the one call that undoes it; its destructor makes that call
// and reports, never throws, when the driver refuses.
#pragma once

#include <cstddef>
#include <map>
#include <memory>

#include "driver/driver.hpp"

namespace aegaeon {

class Allocation {
 public:
  Allocation(std::shared_ptr<Driver> driver, std::size_t bytes);
  ~Allocation();
  Allocation(Allocation const&) = delete;  // one physical allocation, one owner
  Allocation& operator=(Allocation const&) = delete;

  // The undo call, for those who can act on its failure. Nothing is left to undo after success.
  Result release() noexcept;
  [[nodiscard]] MemHandle handle() const noexcept { return handle_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::shared_ptr<Driver> driver_;
  std::size_t bytes_;
  MemHandle handle_ = 0;
  bool live_ = false;
};

class Reservation {
 public:
  Reservation(std::shared_ptr<Driver> driver, std::size_t bytes, std::size_t alignment);
  ~Reservation();
  Reservation(Reservation const&) = delete;  // one address range, one owner
  Reservation& operator=(Reservation const&) = delete;

  Result free() noexcept;
  [[nodiscard]] Address address() const noexcept { return address_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::shared_ptr<Driver> driver_;
  std::size_t bytes_;
  Address address_ = 0;
  bool live_ = false;
};

// A whole allocation at one place of a reservation. Holds both, so that teardown is in order:
// unmap, then free the address, then release the memory.
class Mapping {
 public:
  Mapping(std::shared_ptr<Driver> driver, std::shared_ptr<Reservation> range, std::size_t offset,
          std::shared_ptr<Allocation> memory);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&&) = delete;

  Result map() noexcept;  // again, after an unmap; without access
  Result unmap() noexcept;
  // It was undone by a call that covered its neighbours too.
  void mark_unmapped() noexcept { mapped_ = false; }

  [[nodiscard]] bool mapped() const noexcept { return mapped_; }
  [[nodiscard]] Address address() const noexcept { return range_->address() + offset_; }
  [[nodiscard]] std::size_t offset() const noexcept { return offset_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return memory_->bytes(); }
  [[nodiscard]] std::shared_ptr<Allocation> const& memory() const noexcept { return memory_; }

 private:
  std::shared_ptr<Driver> driver_;
  std::shared_ptr<Allocation> memory_;
  std::shared_ptr<Reservation> range_;
  std::size_t offset_;
  bool mapped_ = false;
};

// Mappings of one reservation by offset.
using Slots = std::map<std::size_t, Mapping>;

// These take neighbours that fill one range without a gap.
Result set_run_access(Driver& driver, Slots const& run) noexcept;  // readable and writable
Result unmap_run(Driver& driver, Slots& run) noexcept;             // one driver call
// Maps an unmapped run as it was. On failure as much as the driver allows is unmapped again.
Result restore_run(Driver& driver, Slots& run) noexcept;

}  // namespace aegaeon
