// Random calls on the host driver against a model: what is mapped where, with which access, which
// handles are the same memory, and the value at both ends of every granule.
#include <unistd.h>

#include <memory>
#include <set>

#include "tests/support.hpp"

namespace aegaeon::tests {
namespace {

struct Handle {
  std::size_t granules = 0;
  std::shared_ptr<std::vector<std::uint8_t>> values;  // one per granule; 0 at first
  bool exportable = false;
};

struct Mapped {
  MemHandle handle = 0;
  Access access = Access::kNone;
};

class Model {
 public:
  explicit Model(std::uint32_t seed)
      : random_(seed), driver_(make_host_driver(kCapacity, seed % 4 != 0)) {
    for (auto& range : ranges_) {
      require(driver_->address_reserve(&range, kRange * kGranule, 0) == kSuccess, "reserve works");
    }
  }

  void step() {
    switch (random_.below(8)) {
      case 0:
        create();
        break;
      case 1:
        release();
        break;
      case 2:
        map();
        break;
      case 3:
      case 4:
        set_access();
        break;
      case 5:
        unmap();
        break;
      case 6:
        share();
        break;
      default:
        write();
    }
  }

  void check() {
    for (auto const& [address, mapped] : mapped_) {
      if (mapped.access == Access::kNone) continue;
      auto const& handle = handles_.at(mapped.handle);
      for (std::size_t i = 0; i < handle.granules; ++i) {
        auto* granule = pointer(address + i * kGranule);
        auto expected = std::byte{(*handle.values)[i]};
        require(granule[0] == expected && granule[kGranule - 1] == expected,
                "every view of a handle shows its bytes");
      }
    }
    MemoryInfo info;
    driver_->memory_info(&info);
    require(info.total_bytes - info.free_bytes == used_bytes(), "memory is counted, once");
  }

  void finish() {
    while (!mapped_.empty()) {
      auto address = mapped_.begin()->first;
      require(driver_->mem_unmap(address, bytes_at(address)) == kSuccess, "unmap works");
      forget(address);
    }
    for (auto range : ranges_) {
      require(driver_->address_free(range, kRange * kGranule) == kSuccess, "free works");
    }
    for (auto const& [id, handle] : handles_) {
      if (!released_.contains(id)) {
        require(driver_->mem_release(id) == kSuccess, "release works");
      }
    }
    MemoryInfo info;
    driver_->memory_info(&info);
    require(info.free_bytes == info.total_bytes, "all memory is back");
  }

 private:
  static constexpr std::size_t kCapacity = 24 * kGranule;
  static constexpr std::size_t kRange = 12;

  std::size_t bytes_at(Address address) const {
    return handles_.at(mapped_.at(address).handle).granules * kGranule;
  }

  template <typename Map>
  auto any(Map const& map) {
    auto it = map.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(random_.below(map.size())));
    return it;
  }

  void create() {
    std::size_t granules = 1 + random_.below(4);
    bool exportable = random_.one_in(4);
    MemHandle created = 0;
    Result result = driver_->mem_create(&created, granules * kGranule, exportable);
    bool fits = used_bytes() + granules * kGranule <= kCapacity;
    require(result == (fits ? kSuccess : kDriverOutOfMemory), "create respects the capacity");
    if (!fits) return;
    handles_[created] = {granules, std::make_shared<std::vector<std::uint8_t>>(granules),
                         exportable};
  }

  void share() {
    if (handles_.empty() || handles_.size() > 30) return;
    auto const& [id, handle] = *any(handles_);
    int fd = -1;
    Result result = driver_->mem_export(&fd, id);
    bool allowed = handle.exportable && !released_.contains(id);
    require(result == (allowed ? kSuccess : kInvalidValue), "what was made for it is exported");
    if (!allowed) return;
    MemHandle imported = 0;
    result = driver_->mem_import(&imported, fd, handle.granules * kGranule);
    close(fd);
    require(result == kSuccess, "import works");
    handles_[imported] = {handle.granules, handle.values, false};
  }

  std::size_t used_bytes() const {
    std::set<void const*> seen;
    std::size_t used = 0;
    for (auto const& [id, handle] : handles_) {
      if (seen.insert(handle.values.get()).second) used += handle.granules * kGranule;
    }
    return used;
  }

  void release() {
    if (handles_.empty()) return;
    auto id = any(handles_)->first;
    bool live = !released_.contains(id);
    require(driver_->mem_release(id) == (live ? kSuccess : kInvalidValue), "release is once");
    released_[id] = true;
    drop_if_dead(id);
  }

  void drop_if_dead(MemHandle id) {
    if (!released_.contains(id)) return;
    for (auto const& [address, mapped] : mapped_) {
      if (mapped.handle == id) return;
    }
    handles_.erase(id);
    released_.erase(id);
  }

  void map() {
    if (handles_.empty()) return;
    auto chosen = any(handles_);
    auto address = ranges_[random_.below(2)] + random_.below(kRange) * kGranule;
    if (!mapped_.empty() && !random_.one_in(3)) {
      // What was created next, at the addresses that come next: such runs move as one.
      auto before = any(mapped_);
      auto next = std::next(handles_.find(before->second.handle));
      if (next != handles_.end()) chosen = next;
      address = before->first + bytes_at(before->first);
    }
    auto const& [id, handle] = *chosen;
    auto bytes = handle.granules * kGranule;
    bool allowed =
        !released_.contains(id) && std::any_of(ranges_.begin(), ranges_.end(), [&](Address range) {
          return range <= address && address + bytes <= range + kRange * kGranule;
        });
    for (auto const& [other, mapped] : mapped_) {
      allowed = allowed && (other + bytes_at(other) <= address || address + bytes <= other);
    }
    Result result = driver_->mem_map(address, bytes, 0, id);
    require(result == (allowed ? kSuccess : kInvalidValue), "map takes free places only");
    if (allowed) mapped_[address] = {id, Access::kNone};
  }

  // A range that starts and ends anywhere; whether whole mappings fill it.
  std::pair<std::vector<Address>, bool> run(Address begin, std::size_t bytes) const {
    std::vector<Address> inside;
    Address reached = begin;
    while (reached < begin + bytes && mapped_.contains(reached)) {
      inside.push_back(reached);
      reached += bytes_at(reached);
    }
    return {inside, reached == begin + bytes};
  }

  std::pair<Address, std::size_t> any_run() {
    if (!mapped_.empty() && !random_.one_in(4)) {  // most of the time something that may work
      auto begin = any(mapped_)->first;
      Address end = begin;
      do {
        end += bytes_at(end);
      } while (mapped_.contains(end) && !random_.one_in(2));
      return {begin, end - begin};
    }
    return {ranges_[random_.below(2)] + random_.below(kRange) * kGranule,
            (1 + random_.below(4)) * kGranule};
  }

  void set_access() {
    auto [begin, bytes] = any_run();
    auto [inside, whole] = run(begin, bytes);
    auto access = random_.one_in(2)   ? Access::kReadWrite
                  : random_.one_in(2) ? Access::kRead
                                      : Access::kNone;
    Result result = driver_->mem_set_access(begin, bytes, access);
    require(result == (whole ? kSuccess : kInvalidValue), "access is set on whole mappings");
    if (!whole) return;
    for (auto address : inside) mapped_[address].access = access;
  }

  void unmap() {
    auto [begin, bytes] = any_run();
    auto [inside, whole] = run(begin, bytes);
    Result result = driver_->mem_unmap(begin, bytes);
    require(result == (whole ? kSuccess : kInvalidValue), "whole mappings are unmapped");
    if (!whole) return;
    for (auto address : inside) forget(address);
  }

  void forget(Address address) {
    auto id = mapped_.at(address).handle;
    mapped_.erase(address);
    drop_if_dead(id);
  }

  void write() {
    for (auto const& [address, mapped] : mapped_) {
      if (mapped.access != Access::kReadWrite || !random_.one_in(2)) continue;
      auto& handle = handles_.at(mapped.handle);
      for (std::size_t i = 0; i < handle.granules; ++i) {
        auto value = static_cast<std::uint8_t>(1 + random_.below(255));
        pointer(address + i * kGranule)[0] = std::byte{value};
        pointer(address + i * kGranule)[kGranule - 1] = std::byte{value};
        (*handle.values)[i] = value;
      }
    }
  }

  Random random_;
  std::shared_ptr<Driver> driver_;
  std::array<Address, 2> ranges_{};
  std::map<MemHandle, Handle> handles_;
  std::map<MemHandle, bool> released_;  // and still mapped
  std::map<Address, Mapped> mapped_;
};

}  // namespace

void host_driver_random(std::size_t num_steps) {
  for (std::uint32_t seed = 0; seed < 3; ++seed) {
    Model model(seed);
    for (std::size_t i = 0; i < num_steps; ++i) {
      model.step();
      model.check();
    }
    if (seed % 2 == 0) model.finish();  // else the driver cleans up after itself
  }
}

}  // namespace aegaeon::tests
