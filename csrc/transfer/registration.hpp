// Registration: pages of ours that the driver has locked for DMA.
#pragma once

#include <cstddef>
#include <memory>

#include "driver/driver.hpp"

namespace aegaeon {

class Registration {
 public:
  // Linux 6.11 to 6.13 lock at most 2 GiB at a time, and drivers refuse 512 GiB.
  static constexpr std::size_t kPieceBytes = std::size_t{1} << 30;

  // In pieces, all or none. No copy may touch two pieces. Throws DriverError, OutOfMemory.
  Registration(std::shared_ptr<Driver> driver, std::byte* data, std::size_t bytes,
               std::size_t piece_bytes = kPieceBytes);
  ~Registration();
  Registration(Registration const&) = delete;  // owns the locks
  Registration& operator=(Registration const&) = delete;

 private:
  void unregister() noexcept;

  std::shared_ptr<Driver> const driver_;
  std::byte* const data_;
  std::size_t const piece_bytes_;
  std::size_t registered_bytes_ = 0;
};

}  // namespace aegaeon
