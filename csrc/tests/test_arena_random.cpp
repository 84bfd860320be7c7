// Random operations on an arena, alone with faults and from several threads.
#include <atomic>
#include <thread>

#include "tests/support.hpp"
#include "vmm/arena.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kCapacity = 24, kRegion = 16;  // granules

void write(Region const& region, std::uint8_t value) {
  for (auto const& range : region.mapped_ranges()) {
    for (std::size_t at = 0; at < range.size_bytes; at += kGranule) {
      auto* granule = pointer(region.address() + range.offset_bytes + at);
      granule[0] = granule[kGranule - 1] = std::byte{value};
    }
  }
}

void require_value(Region const& region, std::uint8_t value) {
  for (auto const& range : region.mapped_ranges()) {
    for (std::size_t at = 0; at < range.size_bytes; at += kGranule) {
      auto* granule = pointer(region.address() + range.offset_bytes + at);
      require(granule[0] == std::byte{value} && granule[kGranule - 1] == std::byte{value},
              "an owner's bytes are its own");
    }
  }
}

// Does something to the region; errors of the driver and of the state are part of the game.
void act(Region& region, Random& random) {
  auto offset = random.below(kRegion) * kGranule;
  auto size = (1 + random.below(kRegion)) * kGranule;
  size = std::min(size, kRegion * kGranule - offset);
  try {
    if (random.one_in(2)) {
      region.map(offset, size);
    } else if (random.one_in(3)) {
      region.unmap(0, std::nullopt);
    } else {
      region.unmap(offset, size);
    }
  } catch (Error const&) {
  }
}

}  // namespace

void arena_random(std::size_t num_seeds) {
  for (std::uint32_t seed = 0; seed < num_seeds; ++seed) {
    Random random(seed);
    auto driver = std::make_shared<FaultyDriver>(make_host_driver(kCapacity * kGranule, true));
    auto arena =
        std::make_shared<Arena>(driver, kCapacity * kGranule, (1 + random.below(4)) * kGranule);
    std::vector<std::shared_ptr<Region>> regions;
    std::vector<std::uint8_t> values;
    for (int i = 0; i < 3; ++i) {
      regions.push_back(arena->reserve(kRegion * kGranule, concat("owner", i), "t"));
      values.push_back(0);
    }
    for (int step = 0; step < 200; ++step) {
      auto i = random.below(regions.size());
      if (random.one_in(3)) {
        driver->fail_call(1 + random.below(12), std::nullopt, 719, random.one_in(4));
      }
      auto generation = regions[i]->generation();
      act(*regions[i], random);
      driver->reset();
      require_ledger(*arena);
      for (std::size_t other = 0; other < regions.size(); ++other) {
        if (other != i || generation == regions[other]->generation()) {
          require_value(*regions[other], values[other]);
        }
      }
      values[i] = static_cast<std::uint8_t>(1 + random.below(255));
      write(*regions[i], values[i]);
      if (random.one_in(20)) {
        regions[i] = arena->reserve(kRegion * kGranule, concat("owner", i), "t");
      }
    }
    if (seed % 2 == 0) {
      arena->close();
    }
    regions.clear();
    arena.reset();
    require_nothing_alive(*driver);
  }
}

void arena_threads(std::size_t num_rounds) {
  auto driver = std::make_shared<FaultyDriver>(make_host_driver(kCapacity * kGranule, true));
  auto arena = std::make_shared<Arena>(driver, kCapacity * kGranule, 2 * kGranule);
  std::atomic<int> num_failed = 0;
  std::vector<std::thread> threads;
  for (std::uint32_t seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      try {
        Random random(seed);
        auto value = static_cast<std::uint8_t>(seed + 1);
        for (std::size_t round = 0; round < num_rounds; ++round) {
          auto region = arena->reserve(kRegion * kGranule, concat("owner", seed), "t");
          for (int step = 0; step < 20; ++step) {
            act(*region, random);
            write(*region, value);
            require_ledger(*arena);
            require_value(*region, value);
          }
          if (random.one_in(2)) region->close();
        }
      } catch (std::exception const& error) {
        std::printf("%s\n", error.what());
        ++num_failed;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  require(num_failed == 0, "threads do not disturb each other");
  arena->close();
  arena.reset();
  require_nothing_alive(*driver);
}

}  // namespace aegaeon::tests
