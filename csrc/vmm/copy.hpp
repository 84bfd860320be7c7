// Copies that are over when they return: for what is small or rare. A Prefetcher moves the rest.
#pragma once

#include <cstddef>

#include "driver/driver.hpp"
#include "driver/stream.hpp"

namespace aegaeon {

// Memory outside of the regions.
struct OtherMemory {
  Address address = 0;
  bool on_device = false;
};

// Throws std::invalid_argument (both are the same bytes, in part) and DriverError: then the
// destination holds anything.
void copy_in(Driver& driver, Stream const& stream, Address to, OtherMemory from, std::size_t bytes);
void copy_out(Driver& driver, Stream const& stream, OtherMemory to, Address from,
              std::size_t bytes);

}  // namespace aegaeon
