// A test is a function with a name; require() throws. No framework: the program exists so that
// sanitizers see the native code without Python around it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver/driver.hpp"
#include "driver/faulty.hpp"
#include "error.hpp"

namespace aegaeon::tests {

inline constexpr std::size_t kGranule = std::size_t{2} << 20;

inline void require(bool condition, std::string const& claim,
                    std::source_location where = std::source_location::current()) {
  if (condition) return;
  throw std::logic_error(concat(where.file_name(), ":", where.line(), ": not so: ", claim));
}

inline void require_nothing_alive(FaultyDriver const& driver) {
  for (auto const& [kind, count] : driver.live()) {
    require(count == 0, concat("no ", kind, " left, found ", count));
  }
}

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  std::size_t below(std::size_t limit) { return engine_() % limit; }
  bool one_in(std::size_t n) { return below(n) == 0; }

 private:
  std::mt19937 engine_;
};

inline std::byte* pointer(Address address) {
  return reinterpret_cast<std::byte*>(address);
}

void arena_random();
void arena_threads();
void file_reader_random();
void host_copy();
void host_driver_random();
void page_copy_random();
void safetensors_random();
void suballocator_random();
void torch_pool_random();
void torch_pool_threads();
void transfer_faults();
void transfers_on_host();
void transfers_on_simulated();

}  // namespace aegaeon::tests
