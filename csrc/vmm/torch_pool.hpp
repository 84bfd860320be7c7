// TorchPool: memory for torch's caching allocator, cut from regions of an arena. torch_hooks.cpp is
// where torch calls. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "vmm/arena.hpp"
#include "vmm/suballocator.hpp"

namespace aegaeon {

struct TorchPoolStats {
  std::size_t allocated_bytes = 0;  // in pieces that torch holds
  std::size_t num_pieces = 0;
  std::size_t largest_free_bytes = 0;  // of address space, with or without memory behind it
  std::uint64_t num_failed = 0;        // allocations for which there was no memory
  std::string last_failure;            // why, the last time; or why freed memory stays mapped
};

class TorchPool : public std::enable_shared_from_this<TorchPool> {
 public:
  // At least one region, all of one device, none in use by another pool.
  explicit TorchPool(std::vector<std::shared_ptr<Region>> regions);

  // Memory that torch holds. The export keeps the region, and its address out of other hands.
  struct Piece {
    std::size_t region_idx = 0;
    Range range;
    Address address = 0;
    std::unique_ptr<Region::Export> hold;
  };
  // Memory is mapped as far as it is missing. None: nothing has changed, stats() says why, and the
  // next call starts afresh.
  std::optional<Piece> allocate(std::size_t bytes) noexcept;
  // The stream's work so far is what the memory waits for before it leaves the region.
  void free(Piece piece, StreamId stream) noexcept;
  // Unmaps the handles that lie wholly in free pieces; how many bytes. Throws like Region::unmap.
  std::size_t trim();

  [[nodiscard]] TorchPoolStats stats() const;
  [[nodiscard]] std::shared_ptr<Driver> const& driver() const noexcept {
    return regions_[0].region->arena()->driver();
  }

  // Between the two, what this thread allocates on this pool's device comes from here. They nest;
  // of several pools the last one activated counts. Throws LifecycleError: not active here.
  void activate();
  void deactivate();
  // The pool that counts in this thread, if there is one.
  static std::shared_ptr<TorchPool> active(int device_index);

 private:
  struct Backing {
    explicit Backing(std::shared_ptr<Region> region_);
    ~Backing();
    Backing(Backing const&) = delete;  // one claim to the region
    Backing& operator=(Backing const&) = delete;

    std::shared_ptr<Region> const region;
    Suballocator pieces;
  };

  Piece cut(std::size_t region_idx, std::size_t bytes);
  static void map_missing(Region& region, Range const& piece);
  [[nodiscard]] bool finish(StreamId stream) const noexcept;
  static std::size_t unmap_whole_handles(Region& region, Range const& free);

  mutable std::mutex mutex_;  // guards all that follows
  std::deque<Backing> regions_;
  std::uint64_t num_failed_ = 0;
  std::string last_failure_;
};

}  // namespace aegaeon
