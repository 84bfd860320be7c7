#include "vmm/torch_pool.hpp"

#include <algorithm>
#include <mutex>
#include <set>
#include <utility>

#include "error.hpp"

namespace aegaeon {
namespace {

thread_local std::vector<std::shared_ptr<TorchPool>> active_pools;  // of this thread, last on top

Range rounded_out(Range const& range, std::size_t unit, std::size_t limit) {
  auto begin = range.offset_bytes / unit * unit;
  auto end = (range.offset_bytes + range.size_bytes + unit - 1) / unit * unit;
  return {begin, std::min(end, limit) - begin};
}

// The parts of `wanted` that none of the ranges, in order and without overlap, covers.
std::vector<Range> gaps(std::vector<Range> const& ranges, Range const& wanted) {
  std::vector<Range> missing;
  auto reached = wanted.offset_bytes;
  auto end = wanted.offset_bytes + wanted.size_bytes;
  auto add_up_to = [&](std::size_t begin) {
    if (begin > reached) missing.push_back({reached, begin - reached});
  };
  for (auto const& range : ranges) {
    if (range.offset_bytes >= end) break;
    add_up_to(range.offset_bytes);
    reached = std::max(reached, range.offset_bytes + range.size_bytes);
  }
  add_up_to(end);
  return missing;
}

// Regions that a pool cuts into pieces: a second one would hand out the same bytes.
class CutRegions {
 public:
  bool add(Region const* region) {
    std::lock_guard lock(mutex_);
    return regions_.insert(region).second;
  }
  void remove(Region const* region) noexcept {
    std::lock_guard lock(mutex_);
    regions_.erase(region);
  }

 private:
  std::mutex mutex_;
  std::set<Region const*> regions_;
};

// Never destroyed: pieces, and so pools, may go after the destructors of this module ran.
CutRegions& cut_regions() {
  static auto* const regions = new CutRegions;
  return *regions;
}

}  // namespace

TorchPool::Backing::Backing(std::shared_ptr<Region> region_)
    : region(std::move(region_)), pieces(region->size_bytes()) {
  if (!cut_regions().add(region.get())) {
    throw LifecycleError("a region can serve one torch pool only, and once");
  }
}

TorchPool::Backing::~Backing() {
  cut_regions().remove(region.get());
}

TorchPool::TorchPool(std::vector<std::shared_ptr<Region>> regions) {
  if (regions.empty()) throw std::invalid_argument("a torch pool needs at least one region");
  for (auto const& region : regions) {
    auto const& first = regions.front();
    if (region->arena()->driver() != first->arena()->driver()) {
      throw std::invalid_argument(concat("the regions of a torch pool have to be on one device: ",
                                         first->arena()->driver()->name(), " and ",
                                         region->arena()->driver()->name()));
    }
    regions_.emplace_back(region);
  }
}

std::optional<TorchPool::Piece> TorchPool::allocate(std::size_t bytes) noexcept try {
  std::lock_guard lock(mutex_);
  try {
    // The tightest fit first. Where memory is short, another region may still have some mapped.
    std::vector<std::pair<std::size_t, std::size_t>> candidates;
    for (std::size_t i = 0; i < regions_.size(); ++i) {
      if (auto fit = regions_[i].pieces.best_fit(bytes)) candidates.emplace_back(*fit, i);
    }
    std::sort(candidates.begin(), candidates.end());
    std::string reasons;
    for (auto [fit, region_idx] : candidates) {
      try {
        return cut(region_idx, bytes);
      } catch (Error const& error) {
        reasons += concat(reasons.empty() ? "" : "; ", error.what());
      }
    }
    if (candidates.empty()) {
      reasons = concat("no region of the pool has ", human_bytes(bytes), " of addresses left");
    }
    throw OutOfMemory(reasons, "torch_malloc", kDriverOutOfMemory, bytes);
  } catch (std::exception const& error) {
    ++num_failed_;
    last_failure_ = error.what();
    return std::nullopt;
  }
} catch (...) {  // not even memory to say so
  return std::nullopt;
}

TorchPool::Piece TorchPool::cut(std::size_t region_idx, std::size_t bytes) {
  auto& region = *regions_[region_idx].region;
  auto& pieces = regions_[region_idx].pieces;
  auto range = pieces.allocate(bytes).value();
  try {
    map_missing(region, range);
    return {region_idx, range, region.address() + range.offset_bytes, region.export_range(range)};
  } catch (...) {
    static_cast<void>(pieces.free(range.offset_bytes));
    throw;
  }
}

// Whole large handles, of which the pieces to come have their share too; where there is no memory
// for those, only what the piece lies on.
void TorchPool::map_missing(Region& region, Range const& piece) {
  auto large = region.arena()->handle_bytes();
  auto small = region.arena()->driver()->granularity_bytes();
  auto map_rounded = [&](std::size_t unit) {
    auto missing = gaps(region.mapped_ranges(), rounded_out(piece, unit, region.size_bytes()));
    std::vector<Step> steps;
    for (auto const& gap : missing) {
      steps.push_back({.kind = Step::Kind::kMap,
                       .region = region.shared_from_this(),
                       .offset_bytes = gap.offset_bytes,
                       .size_bytes = gap.size_bytes});
    }
    region.arena()->commit(std::move(steps));
  };
  try {
    map_rounded(large);
  } catch (OutOfMemory const&) {
    if (large == small) throw;
    map_rounded(small);
  }
}

void TorchPool::free(Piece piece, StreamId stream) noexcept try {
  bool done = finish(stream);
  auto& region = *regions_[piece.region_idx].region;
  auto& pieces = regions_[piece.region_idx].pieces;
  std::lock_guard lock(mutex_);
  auto whole = pieces.free(piece.range.offset_bytes);
  if (!done) return;
  try {
    static_cast<void>(unmap_whole_handles(region, whole));
  } catch (Error const& error) {  // it stays mapped, for the pieces to come and for trim()
    last_failure_ = error.what();
  }
} catch (std::exception const& error) {
  std::fprintf(stderr, "aegaeon_kernels: freeing memory of torch: %s\n", error.what());
}

// Waits for the stream, unless it is being captured: waiting would spoil the capture.
bool TorchPool::finish(StreamId stream) const noexcept {
  bool capturing = true;
  Result result = driver()->stream_is_capturing(&capturing, stream);
  return result == kSuccess && !capturing && driver()->stream_synchronize(stream) == kSuccess;
}

std::size_t TorchPool::trim() {
  std::lock_guard lock(mutex_);
  std::size_t unmapped = 0;
  for (auto& backing : regions_) {
    for (auto const& free : backing.pieces.free_ranges()) {
      unmapped += unmap_whole_handles(*backing.region, free);
    }
  }
  return unmapped;
}

std::size_t TorchPool::unmap_whole_handles(Region& region, Range const& free) {
  if (region.closed()) return 0;
  // A mapped range ends where a handle does, and large handles start at multiples of their size.
  auto large = region.arena()->handle_bytes();
  std::size_t unmapped = 0;
  for (auto const& mapped : region.mapped_ranges()) {
    auto mapped_end = mapped.offset_bytes + mapped.size_bytes;
    auto free_end = free.offset_bytes + free.size_bytes;
    auto begin = free.offset_bytes <= mapped.offset_bytes
                     ? mapped.offset_bytes
                     : (free.offset_bytes + large - 1) / large * large;
    auto end = mapped_end <= free_end ? mapped_end : free_end / large * large;
    if (begin >= end) continue;
    region.unmap(begin, end - begin);
    unmapped += end - begin;
  }
  return unmapped;
}

TorchPoolStats TorchPool::stats() const {
  std::lock_guard lock(mutex_);
  TorchPoolStats stats{.num_failed = num_failed_, .last_failure = last_failure_};
  for (auto const& backing : regions_) {
    auto const& pieces = backing.pieces;
    stats.allocated_bytes += pieces.allocated_bytes();
    stats.num_pieces += pieces.num_pieces();
    stats.largest_free_bytes = std::max(stats.largest_free_bytes, pieces.largest_free_bytes());
  }
  return stats;
}

void TorchPool::activate() {
  active_pools.push_back(shared_from_this());
}

void TorchPool::deactivate() {
  auto last = std::find(active_pools.rbegin(), active_pools.rend(), shared_from_this());
  if (last == active_pools.rend()) {
    throw LifecycleError("the torch pool is not active in this thread");
  }
  active_pools.erase(std::next(last).base());
}

std::shared_ptr<TorchPool> TorchPool::active(int device_index) {
  auto last = std::find_if(active_pools.rbegin(), active_pools.rend(), [&](auto const& pool) {
    return pool->driver()->device_index() == device_index;
  });
  return last == active_pools.rend() ? nullptr : *last;
}

}  // namespace aegaeon
