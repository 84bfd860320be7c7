// torch's side of the pluggable allocator, played at random: pieces of several pools, with faults,
// evictions between allocations, and frees from other threads and after the pool is forgotten.
#include <atomic>
#include <thread>

#include "driver/stream.hpp"
#include "tests/support.hpp"
#include "vmm/torch_pool.hpp"

extern "C" {
void* aegaeon_torch_malloc(std::size_t size, int device, void* stream) noexcept;
void aegaeon_torch_free(void* pointer, std::size_t size, int device, void* stream) noexcept;
}

namespace aegaeon::tests {
namespace {

constexpr std::size_t kCapacity = 16 * kGranule;

struct TorchPiece {
  std::size_t bytes = 0;
  std::uint8_t value = 0;
  std::size_t region_idx = 0;
};

std::array<std::byte*, 3> samples(Address address, TorchPiece const& piece) {
  auto* bytes = pointer(address);
  return {bytes, bytes + piece.bytes / 2, bytes + piece.bytes - 1};
}

void fill(Address address, TorchPiece const& piece) {
  for (auto* byte : samples(address, piece)) *byte = std::byte{piece.value};
}

void require_filled(Address address, TorchPiece const& piece) {
  for (auto const* byte : samples(address, piece)) {
    require(*byte == std::byte{piece.value}, "a piece is nobody else's");
  }
}

class TorchModel {
 public:
  explicit TorchModel(std::uint32_t seed)
      : random_(seed),
        driver_(std::make_shared<FaultyDriver>(make_host_driver(kCapacity, true))),
        stream_(driver_),
        arena_(std::make_shared<Arena>(driver_, kCapacity, (1 + random_.below(4)) * kGranule)) {
    for (std::size_t i = 0; i < 3; ++i) {
      regions_.push_back(arena_->reserve((4 + random_.below(8)) * kGranule, concat("m", i), "t"));
    }
    pools_.push_back(std::make_shared<TorchPool>(std::vector{regions_[0], regions_[1]}));
    pools_.push_back(std::make_shared<TorchPool>(std::vector{regions_[2]}));
  }

  void step() {
    if (random_.one_in(4)) {
      driver_->fail_call(1 + random_.below(6), std::nullopt, random_.one_in(2) ? 2 : 719,
                         random_.one_in(4));
    }
    auto before = mapped();
    if (random_.below(100) < 60) {
      allocate(before);
    } else if (!pieces_.empty()) {
      free_any();
    }
    driver_->reset();
    if (random_.one_in(30)) evict_and_restore();
    check();
  }

  void finish() {
    auto whom = random_.below(3);
    if (whom == 0) pools_.clear();  // the pieces keep what they need
    while (!pieces_.empty()) free_any();
    if (whom != 0) {
      for (auto const& pool : pools_) {
        static_cast<void>(pool->trim());
        require(pool->stats().num_pieces == 0 && pool->stats().allocated_bytes == 0,
                "all pieces are back");
      }
      for (auto const& region : regions_) {
        require(region->mapped_bytes() == 0, "a pool without pieces holds no memory");
      }
    }
    pools_.clear();
    regions_.clear();
    arena_->close();
    arena_.reset();
  }

  [[nodiscard]] FaultyDriver& driver() { return *driver_; }
  void end_stream() { require(stream_.destroy() == kSuccess, "the stream ends"); }

 private:
  [[nodiscard]] std::vector<std::size_t> mapped() const {
    std::vector<std::size_t> bytes;
    for (auto const& region : regions_) bytes.push_back(region->mapped_bytes());
    return bytes;
  }

  void allocate(std::vector<std::size_t> const& mapped_before) {
    auto pool_idx = random_.below(pools_.size());
    auto& pool = *pools_[pool_idx];
    auto before = pool.stats();
    auto bytes = 1 + random_.below(random_.one_in(2) ? 3 * kGranule : 4096);
    pool.activate();
    auto* got = aegaeon_torch_malloc(bytes, 0, stream());
    pool.deactivate();
    auto after = pool.stats();
    if (got == nullptr) {
      require(after.num_failed == before.num_failed + 1 && !after.last_failure.empty(),
              "a failure is counted, with its reason");
      require(
          after.num_pieces == before.num_pieces && after.allocated_bytes == before.allocated_bytes,
          "a failed allocation takes no piece");
      if (arena_->stats().quarantined_bytes == 0) {
        require(mapped() == mapped_before, "a failed allocation leaves no memory mapped");
      }
      return;
    }
    auto address = reinterpret_cast<Address>(got);
    require(address % Suballocator::kAlignment == 0, "pieces are aligned");
    require(after.num_pieces == before.num_pieces + 1, "a piece is counted");
    TorchPiece piece{bytes, static_cast<std::uint8_t>(1 + random_.below(255)), region_of(address)};
    require((piece.region_idx == 2) == (pool_idx == 1), "the active pool is asked");
    fill(address, piece);
    pieces_.emplace(address, piece);
  }

  void free_any() {
    auto it = pieces_.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(random_.below(pieces_.size())));
    auto free = [this, it] {
      aegaeon_torch_free(reinterpret_cast<void*>(it->first), it->second.bytes, 0, stream());
    };
    if (random_.one_in(8)) {
      std::thread(free).join();
    } else {
      free();
    }
    pieces_.erase(it);
  }

  // What a switch of models does: all memory goes, and comes back with other contents.
  void evict_and_restore() {
    auto idx = random_.below(regions_.size());
    auto& region = *regions_[idx];
    if (region.mapped_bytes() == 0) return;
    auto ranges = region.mapped_ranges();
    region.unmap(0, std::nullopt);
    for (auto const& range : ranges) region.map(range.offset_bytes, range.size_bytes);
    for (auto const& [address, piece] : pieces_) {
      if (piece.region_idx == idx) fill(address, piece);
    }
  }

  [[nodiscard]] std::size_t region_of(Address address) const {
    for (std::size_t i = 0; i < regions_.size(); ++i) {
      if (address >= regions_[i]->address() &&
          address < regions_[i]->address() + regions_[i]->size_bytes()) {
        return i;
      }
    }
    throw std::logic_error("an address outside of all regions");
  }

  void check() const {
    Address reached = 0;
    for (auto const& [address, piece] : pieces_) {
      require(address >= reached, "pieces do not overlap");
      reached = address + piece.bytes;
      require_filled(address, piece);
    }
    auto stats = arena_->stats();
    std::size_t owned = 0;
    for (auto const& [who, bytes] : stats.owners) owned += bytes;
    require(owned + stats.free_bytes + stats.quarantined_bytes == stats.capacity_bytes,
            "the ledger holds");
  }

  [[nodiscard]] void* stream() const { return reinterpret_cast<void*>(stream_.id()); }

  Random random_;
  std::shared_ptr<FaultyDriver> driver_;
  Stream stream_;
  std::shared_ptr<Arena> arena_;
  std::vector<std::shared_ptr<Region>> regions_;
  std::vector<std::shared_ptr<TorchPool>> pools_;
  std::map<Address, TorchPiece> pieces_;
};

}  // namespace

void torch_pool_random(std::size_t num_seeds) {
  for (std::uint32_t seed = 0; seed < num_seeds; ++seed) {
    TorchModel model(seed);
    for (int step = 0; step < 150; ++step) model.step();
    model.finish();
    model.end_stream();
    require_nothing_alive(model.driver());
  }
}

void torch_pool_threads(std::size_t num_steps) {
  auto driver = std::make_shared<FaultyDriver>(make_host_driver(kCapacity, true));
  auto arena = std::make_shared<Arena>(driver, kCapacity, 2 * kGranule);
  auto shared = std::make_shared<TorchPool>(std::vector{arena->reserve(kCapacity, "shared", "t")});
  std::atomic<int> num_failed = 0;
  std::vector<std::thread> threads;
  for (std::uint32_t seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      try {
        Random random(seed);
        Stream stream(driver);
        auto* id = reinterpret_cast<void*>(stream.id());
        shared->activate();
        std::map<Address, TorchPiece> mine;
        for (std::size_t step = 0; step < num_steps; ++step) {
          if (random.below(100) < 55) {
            TorchPiece piece{1 + random.below(kGranule), static_cast<std::uint8_t>(seed + 1), 0};
            auto address = reinterpret_cast<Address>(aegaeon_torch_malloc(piece.bytes, 0, id));
            if (address == 0) continue;
            fill(address, piece);
            mine.emplace(address, piece);
          } else if (!mine.empty()) {
            auto it = mine.begin();
            require_filled(it->first, it->second);
            aegaeon_torch_free(reinterpret_cast<void*>(it->first), it->second.bytes, 0, id);
            mine.erase(it);
          }
        }
        for (auto const& [address, piece] : mine) {
          require_filled(address, piece);
          aegaeon_torch_free(reinterpret_cast<void*>(address), piece.bytes, 0, id);
        }
        shared->deactivate();
      } catch (std::exception const& error) {
        std::printf("%s\n", error.what());
        ++num_failed;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  require(num_failed == 0, "threads do not disturb each other");
  require(shared->stats().num_pieces == 0, "all pieces are back");
  static_cast<void>(shared->trim());
  require(arena->stats().owners.empty(), "and all memory");
  shared.reset();
  arena->close();
  arena.reset();
  require_nothing_alive(*driver);
}

}  // namespace aegaeon::tests
