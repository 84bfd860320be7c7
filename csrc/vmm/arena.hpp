// Arena: the physical pool of one device, its owners and budgets. Region: a stable virtual range
// that draws on it. All public members are safe to call from any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "driver/driver.hpp"
#include "vmm/handle_pool.hpp"
#include "vmm/handles.hpp"

namespace aegaeon {

class Region;

struct Range {
  std::size_t offset_bytes = 0;
  std::size_t size_bytes = 0;
};

// Sum of owned bytes + free_bytes + quarantined_bytes == capacity_bytes, always.
struct ArenaStats {
  std::map<std::pair<std::string, std::string>, std::size_t> owners;  // (owner, tag): mapped bytes
  std::size_t capacity_bytes = 0;
  std::size_t free_bytes = 0;
  std::size_t quarantined_bytes = 0;
  std::size_t handle_bytes = 0;
  std::size_t num_regions = 0;
  HandlePoolStats pool;
};

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  // handle_bytes: none chooses a power of two near capacity / 256, from the granularity to 64 MiB.
  Arena(std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
        std::optional<std::size_t> handle_bytes);
  ~Arena();
  Arena(Arena const&) = delete;  // owns physical memory
  Arena& operator=(Arena const&) = delete;

  std::shared_ptr<Region> reserve(std::size_t size_bytes, std::string owner, std::string tag);
  void set_limit(std::string const& owner, std::size_t min_bytes,
                 std::optional<std::size_t> max_bytes);
  [[nodiscard]] ArenaStats stats() const;
  // Closes the regions, then releases the handles. On failure those closed so far stay closed, and
  // it may be called again.
  void close();

  [[nodiscard]] std::shared_ptr<Driver> const& driver() const noexcept { return driver_; }
  [[nodiscard]] std::size_t capacity_bytes() const noexcept { return capacity_; }
  [[nodiscard]] std::size_t handle_bytes() const noexcept { return handle_bytes_; }

 private:
  friend class Region;
  struct Limit {
    std::size_t min_bytes = 0;
    std::optional<std::size_t> max_bytes;
  };

  // All private members: the mutex is held.
  void admit(Region const& region, std::size_t bytes) const;  // throws OutOfMemory
  void charge(Region const& region, std::size_t bytes);
  void discharge(Region const& region, std::size_t bytes) noexcept;
  [[nodiscard]] std::size_t owned_by(std::string const& owner) const;
  [[nodiscard]] std::size_t free_bytes() const noexcept;
  [[nodiscard]] std::string holders() const;

  std::shared_ptr<Driver> const driver_;
  std::size_t const capacity_;
  std::size_t const handle_bytes_;
  mutable std::mutex mutex_;  // guards all that follows, and the state of every region
  bool closed_ = false;
  std::size_t owned_ = 0;
  std::size_t quarantined_ = 0;
  std::map<std::pair<std::string, std::string>, std::size_t> ledger_;
  std::map<std::string, Limit> limits_;
  std::map<std::uint64_t, std::weak_ptr<Region>> regions_;
  std::uint64_t next_region_id_ = 1;
  HandlePool pool_;
  // Mappings of regions that are gone which the driver refused to undo. Counted as quarantined.
  std::vector<Mapping> lost_;
};

class Region : public std::enable_shared_from_this<Region> {
 public:
  Region(std::shared_ptr<Arena> arena, std::uint64_t id, std::size_t size_bytes, std::string owner,
         std::string tag);
  ~Region();
  Region(Region const&) = delete;  // owns an address range
  Region& operator=(Region const&) = delete;

  // Backs the range with physical memory: all of it or, on any error, none. Contents are undefined.
  void map(std::size_t offset_bytes, std::optional<std::size_t> size_bytes);
  // Takes the memory away. Without a size: whatever is mapped from the offset on.
  void unmap(std::size_t offset_bytes, std::optional<std::size_t> size_bytes);
  // Unmaps, and frees the address range, at the latest with the last export.
  void close();

  [[nodiscard]] Address address() const noexcept { return range_->address(); }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return range_->bytes(); }
  [[nodiscard]] std::size_t mapped_bytes() const noexcept { return mapped_bytes_; }
  [[nodiscard]] std::vector<Range> mapped_ranges() const;
  [[nodiscard]] std::uint64_t generation() const noexcept { return generation_; }
  [[nodiscard]] bool closed() const noexcept { return closed_; }
  [[nodiscard]] std::string const& owner() const noexcept { return owner_; }
  [[nodiscard]] std::string const& tag() const noexcept { return tag_; }
  [[nodiscard]] std::shared_ptr<Arena> const& arena() const noexcept { return arena_; }

  // While a Use lives, the region's mappings stay: unmap and close refuse.
  class Use {
   public:
    explicit Use(std::shared_ptr<Region> region) : region_(std::move(region)) {
      ++region_->num_uses_;
    }
    ~Use() { --region_->num_uses_; }
    Use(Use const&) = delete;  // one use, one count
    Use& operator=(Use const&) = delete;

   private:
    std::shared_ptr<Region> region_;
  };
  // Throws LifecycleError unless every range is mapped.
  std::unique_ptr<Use> use(std::vector<Range> const& ranges);

  // While an Export lives, the address range stays reserved, so that a tensor which outlives the
  // region faults instead of seeing somebody else's memory. Mappings come and go.
  class Export {
   public:
    explicit Export(std::shared_ptr<Region> region) : region_(std::move(region)) {
      ++region_->num_exports_;
    }
    ~Export() { --region_->num_exports_; }
    Export(Export const&) = delete;  // one export, one count
    Export& operator=(Export const&) = delete;

   private:
    std::shared_ptr<Region> region_;
  };
  std::unique_ptr<Export> export_range(Range const& range);

 private:
  friend class Arena;

  // All private members: the arena's mutex is held.
  [[nodiscard]] std::string title() const;
  void require_open(char const* verb) const;
  void require_unused(char const* verb) const;
  [[nodiscard]] bool covers(Range const& range) const;
  Range checked_range(char const* verb, std::size_t offset_bytes,
                      std::optional<std::size_t> size_bytes) const;
  void require_free_slots(Range const& range);
  [[nodiscard]] std::vector<Range> slots_for(Range const& range) const;
  Slots map_slots(std::vector<Range> const& slots);
  void require_whole_handles(Range const& range) const;
  std::vector<Slots> extract_runs(Range const& range);
  Result unmap_runs(std::vector<Slots>& runs) noexcept;
  void put_back(std::vector<Slots>& runs) noexcept;
  void give_back(Slots& slots);
  void quarantine(Slots& slots) noexcept;
  Result heal();

  std::shared_ptr<Arena> const arena_;
  std::uint64_t const id_;
  std::string const owner_;
  std::string const tag_;
  std::shared_ptr<Reservation> const range_;
  Slots mapped_;
  std::atomic<std::size_t> mapped_bytes_{0};
  // Mappings whose undoing failed; neither owned nor free. Tried again at every later call.
  Slots quarantined_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::size_t> num_uses_{0};
  std::atomic<std::size_t> num_exports_{0};
  std::atomic<bool> closed_{false};
};

}  // namespace aegaeon
