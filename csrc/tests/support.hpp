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
#include "vmm/arena.hpp"

namespace aegaeon::tests {

inline constexpr std::size_t kGranule = std::size_t{2} << 20;
inline constexpr std::size_t kPage =
    4096;  // the granule of devices of which every byte is looked at

inline void require(bool condition, std::string const& claim,
                    std::source_location where = std::source_location::current()) {
  if (condition) return;
  throw std::logic_error(concat(where.file_name(), ":", where.line(), ": not so: ", claim));
}

// owned + free + quarantined is the capacity, always.
inline void require_ledger(Arena const& arena) {
  auto stats = arena.stats();
  std::size_t owned = 0;
  for (auto const& [who, bytes] : stats.owners) owned += bytes;
  require(owned + stats.free_bytes + stats.quarantined_bytes == stats.capacity_bytes,
          "the ledger holds");
  require(stats.pool.created_bytes <= stats.capacity_bytes, "no more is created than allowed");
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

// size: what main.cpp's table says.
void access_random(std::size_t size);
void alias_set_threads(std::size_t size);
void arena_random(std::size_t size);
void arena_threads(std::size_t size);
void arena_walk(std::size_t size);
void fault_sweep(std::size_t size);
void file_reader_random(std::size_t size);
void handovers(std::size_t size);
void host_copy(std::size_t size);
void host_driver_random(std::size_t size);
void image_files_random(std::size_t size);
void images_fuzz(std::size_t size);
void page_copy_random(std::size_t size);
void safetensors_fuzz(std::size_t size);
void suballocator_random(std::size_t size);
void torch_pool_random(std::size_t size);
void torch_pool_threads(std::size_t size);
void transfer_faults(std::size_t size);
void transfers_on_host(std::size_t size);
void transfers_on_simulated(std::size_t size);

}  // namespace aegaeon::tests
