// Owners of driver objects. Each knows the one call that undoes it; its destructor makes that call
// and reports, never throws, when the driver refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "driver/driver.hpp"
#include "vmm/shared_handle.hpp"

namespace aegaeon {

class Allocation {
 public:
  Allocation(std::shared_ptr<Driver> driver, std::size_t bytes, bool exportable);
  // Memory of another process, by its descriptor, which stays the caller's.
  Allocation(std::shared_ptr<Driver> driver, SharedHandle const& shared);
  ~Allocation();
  Allocation(Allocation const&) = delete;  // one physical allocation, one owner
  Allocation& operator=(Allocation const&) = delete;

  // The undo call, for those who can act on its failure. Nothing is left to undo after success.
  Result release() noexcept;
  [[nodiscard]] bool live() const noexcept { return live_; }
  [[nodiscard]] MemHandle handle() const noexcept { return handle_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

  // What the arena knows about it; guarded by the arena's mutex.
  struct Record {
    std::uint64_t region_id = 0;  // where it was mapped last
    std::size_t offset = 0;
    std::optional<std::string> owner;  // whose bytes it may hold; none: as the driver made it
    std::uint64_t pool_age = 0;        // its place among the free handles; 0: not free
    std::size_t quarantined = 0;       // at so many places
  };
  Record record;

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
  Result set_access(Access access) noexcept;
  // Done by a call that covered its neighbours too.
  void mark_unmapped() noexcept;
  void mark_access(Access access) noexcept { access_ = access; }

  [[nodiscard]] bool mapped() const noexcept { return mapped_; }
  [[nodiscard]] Access access() const noexcept { return access_; }
  [[nodiscard]] Address address() const noexcept { return range_->address() + offset_; }
  [[nodiscard]] std::size_t offset() const noexcept { return offset_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return memory_->bytes(); }
  [[nodiscard]] std::shared_ptr<Allocation> const& memory() const noexcept { return memory_; }
  [[nodiscard]] std::shared_ptr<Reservation> const& range() const noexcept { return range_; }

  // What its region knows about it; guarded by the arena's mutex.
  struct Record {
    bool read_only = false;       // outside of windows: access() may be more than that
    std::size_t num_writers = 0;  // transfers in flight that write to it
    std::uint64_t number = 0;  // grows from mapping to mapping; one that comes back keeps its own
  };
  Record record;

 private:
  std::shared_ptr<Driver> driver_;
  std::shared_ptr<Allocation> memory_;
  std::shared_ptr<Reservation> range_;
  std::size_t offset_;
  bool mapped_ = false;
  Access access_ = Access::kNone;
};

// Mappings of one reservation by offset.
using Slots = std::map<std::size_t, Mapping>;

// A run: neighbours that fill one range without a gap. One driver call for all of them.
Result set_run_access(Driver& driver, Slots::iterator begin, Slots::iterator end,
                      Access access) noexcept;
Result unmap_run(Driver& driver, Slots::iterator begin, Slots::iterator end) noexcept;

// Splits the mappings of [begin, end) into runs of those that `wanted` is true of and calls
// act(first, last) for each.
template <typename Wanted, typename Act>
void for_each_run(Slots::iterator begin, Slots::iterator end, Wanted wanted, Act act) {
  for (auto first = begin; first != end;) {
    if (!wanted(first->second)) {
      ++first;
      continue;
    }
    auto last = first;
    auto reached = first->first;
    while (last != end && last->first == reached && wanted(last->second)) {
      reached += last->second.bytes();
      ++last;
    }
    act(first, last);
    first = last;
  }
}

}  // namespace aegaeon
