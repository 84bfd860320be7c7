// Memory that changes its owner, in every way in which it can: the new owner reads all of it before
// its first write and must not find one word of anybody else. Every owner fills what it has with
// words that say whose they are.
#include <map>

#include "tests/support.hpp"
#include "vmm/alias_set.hpp"
#include "vmm/torch_pool.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kSlot = 8, kNumSlots = 3;  // pages; each slot can be one owner's
constexpr std::size_t kNumOwners = 4;
constexpr std::uint64_t kPoisonWord = ~std::uint64_t{0};

struct Seen {
  std::uint64_t num_words = 0;
  std::map<char const*, std::uint64_t> num_ways;
};

class Owners {
 public:
  Owners(std::uint32_t seed, Seen& seen)
      : random_(seed),
        seen_(seen),
        driver_(std::make_shared<FaultyDriver>(make_host_driver(kCapacity, seed % 2 == 0, kPage))),
        // Also handles that do not divide a slot, so that some are given up for granules.
        arena_(std::make_shared<Arena>(driver_, kCapacity, (1 + seed % 5) * kPage, seed % 4 == 3)),
        debug_(seed % 3 == 0),
        stream_(driver_) {
    for (std::size_t i = 0; i < kNumOwners; ++i) names_.push_back(concat("owner", i));
    regions_.resize(kNumOwners);
    for (std::size_t i = 0; i < kNumOwners; ++i) reserve(i);
    make_set();
  }

  void hand_over() {
    if (random_.one_in(10)) {
      driver_->fail_call(1 + random_.below(12), std::nullopt, 719, random_.one_in(4));
    }
    try {
      switch (random_.below(5)) {
        case 0:
          exchange();
          break;
        case 1:
          unmap_then_map();
          break;
        case 2:
          close_then_map();
          break;
        case 3:
          give();
          break;
        default:
          by_torch_pool();
      }
    } catch (DriverError const&) {  // then nothing has changed hands
    }
    driver_->reset();
    for (std::size_t i = 0; i < kNumOwners; ++i) {
      if (!regions_[i]) reserve(i);
    }
    if (slots_[owner_idx(set_->owner())]->mapped_bytes() == 0) {
      // The way back failed too: a slot of debug mode that is mapped nowhere cannot be given again.
      close_set();
      make_set();
    }
  }

  void finish() {
    close_set();
    arena_->close();
    regions_.clear();
    arena_.reset();
  }
  [[nodiscard]] FaultyDriver const& driver() const noexcept { return *driver_; }

 private:
  static constexpr std::size_t kCapacity = kNumSlots * kSlot * kPage;

  void reserve(std::size_t i) { regions_[i] = arena_->reserve(kSlot * kPage, names_[i], "t"); }

  void make_set() {
    set_ = AliasSet::create(arena_, kSlot * kPage, names_, "t", debug_);
    for (auto const& name : names_) slots_.push_back(set_->region(name));
    look_at_slot();
  }

  void close_set() {
    slots_.clear();
    set_->close(false);
    set_.reset();
  }

  // Two owners' regions in one plan.
  void exchange() {
    auto [from, to] = two_owners();
    ensure_mapped(from);
    if (regions_[to]->mapped_bytes() != 0) regions_[to]->unmap(0, std::nullopt);
    driver_used(*regions_[from]);
    arena_->commit({{.kind = Step::Kind::kUnmap, .region = regions_[from], .size_bytes = {}},
                    {.region = regions_[to], .size_bytes = {}, .contents = contents()}});
    ++seen_.num_ways["plan"];
    take_over(*regions_[to], to);
  }

  void unmap_then_map() {
    auto [from, to] = two_owners();
    ensure_mapped(from);
    if (regions_[to]->mapped_bytes() != 0) regions_[to]->unmap(0, std::nullopt);
    regions_[from]->unmap(0, std::nullopt);
    // Parts of it, and so other handles than the old owner's.
    auto begin = random_.below(kSlot);
    regions_[to]->map(begin * kPage, std::nullopt, contents());
    ++seen_.num_ways["unmap, map"];
    take_over(*regions_[to], to);
    regions_[to]->unmap(begin * kPage, std::nullopt);
  }

  void close_then_map() {
    auto [from, to] = two_owners();
    ensure_mapped(from);
    if (regions_[to]->mapped_bytes() != 0) regions_[to]->unmap(0, std::nullopt);
    if (random_.one_in(2)) {
      regions_[from]->close();
    } else {
      driver_->reset();  // the end of an object can only report that a call failed
    }
    regions_[from].reset();
    reserve(from);
    regions_[to]->map(0, std::nullopt, contents());
    ++seen_.num_ways["close, map"];
    take_over(*regions_[to], to);
  }

  void give() {
    auto to = random_.below(kNumOwners);
    bool changes = set_->owner() != slots_[to]->owner();
    if (!changes) return;
    driver_used(*slots_[owner_idx(set_->owner())]);
    set_->give(slots_[to]->owner(), contents());
    ++seen_.num_ways["alias"];
    look_at_slot();
  }

  void by_torch_pool() {
    auto [from, to] = two_owners();
    ensure_mapped(from);
    regions_[from]->unmap(0, std::nullopt);
    if (regions_[to]->mapped_bytes() != 0) regions_[to]->unmap(0, std::nullopt);
    TorchPool pool({regions_[to]});
    auto piece = pool.allocate((1 + random_.below(kSlot)) * kPage);
    if (!piece) return;  // a fault
    ++seen_.num_ways["torch pool"];
    take_over(*regions_[to], to);
    pool.free(*std::move(piece), stream_.id());
    driver_->reset();
    static_cast<void>(pool.trim());
  }

  void look_at_slot() {
    auto to = owner_idx(set_->owner());
    take_over(*slots_[to], to);
  }

  // Reads every word, then writes its own.
  void take_over(Region const& region, std::size_t owner) {
    for (auto const& range : region.mapped_ranges()) {
      auto* words = reinterpret_cast<std::uint64_t*>(region.address() + range.offset_bytes);
      auto num_words = range.size_bytes / sizeof(std::uint64_t);
      std::size_t num_stale = 0;
      for (std::size_t i = 0; i < num_words; ++i) {
        bool own = words[i] >> 56 == owner + 1;
        num_stale += words[i] != 0 && words[i] != kPoisonWord && !own;
      }
      require(num_stale == 0,
              concat(num_stale, " words of another owner are seen by '", region.owner(), "'"));
      seen_.num_words += num_words;
      std::fill_n(words, num_words, ((std::uint64_t{owner} + 1) << 56) + ++next_word_);
    }
  }

  // The device still writes there when it is taken away: that is waited for.
  void driver_used(Region& region) {
    if (!random_.one_in(3) || region.mapped_bytes() == 0) return;
    auto owner = owner_idx(region.owner());
    auto result = driver_->memset_async(region.address(), static_cast<std::uint8_t>(owner + 1),
                                        region.mapped_bytes(), stream_.id());
    try {
      if (result == kSuccess) region.record(stream_.id());
    } catch (DriverError const&) {
      driver_->reset();
      check(*driver_, driver_->stream_synchronize(stream_.id()), "stream_synchronize");
    }
  }

  void ensure_mapped(std::size_t owner) {
    auto& region = *regions_[owner];
    if (region.mapped_bytes() == kSlot * kPage) return;
    if (region.mapped_bytes() != 0) region.unmap(0, std::nullopt);
    region.map(0, std::nullopt);
    take_over(region, owner);
  }

  // At most one region stays mapped beside these two, so that there is always room.
  std::pair<std::size_t, std::size_t> two_owners() {
    auto from = random_.below(kNumOwners);
    auto to = (from + 1 + random_.below(kNumOwners - 1)) % kNumOwners;
    for (std::size_t i = 0; i < kNumOwners; ++i) {
      if (i != from && i != to && regions_[i]->mapped_bytes() != 0) {
        regions_[i]->unmap(0, std::nullopt);
      }
    }
    return {from, to};
  }

  Contents contents() { return random_.one_in(4) ? Contents::kPoison : Contents::kZero; }

  [[nodiscard]] std::size_t owner_idx(std::string const& name) const {
    return static_cast<std::size_t>(name.back() - '0');
  }

  Random random_;
  Seen& seen_;
  std::shared_ptr<FaultyDriver> driver_;
  std::shared_ptr<Arena> arena_;
  bool const debug_;  // of the alias set
  Stream stream_;
  std::vector<std::string> names_;
  std::vector<std::shared_ptr<Region>> regions_;
  std::shared_ptr<AliasSet> set_;
  std::vector<std::shared_ptr<Region>> slots_;
  std::uint64_t next_word_ = 0;
};

}  // namespace

void handovers(std::size_t num_handovers) {
  constexpr std::uint64_t kOfOne = 2'000;
  Seen seen;
  std::uint64_t done = 0;
  for (std::uint32_t seed = 0; done < num_handovers; ++seed) {
    std::shared_ptr<FaultyDriver const> driver;
    {
      Owners owners(seed, seen);
      auto goal = std::min<std::uint64_t>(done + kOfOne, num_handovers);
      while (done < goal) {
        owners.hand_over();
        done = 0;
        for (auto const& [way, count] : seen.num_ways) done += count;
      }
      owners.finish();
      auto live = owners.driver().live();
      live["streams"] -= 1;  // the owners' own
      for (auto const& [kind, count] : live) {
        require(count == 0, concat("no ", kind, " left, found ", count));
      }
    }
  }
  std::printf("        %llu words read before the first write;",
              static_cast<unsigned long long>(seen.num_words));
  for (auto const& [way, count] : seen.num_ways) {
    std::printf(" %s: %llu", way, static_cast<unsigned long long>(count));
    require(count * 20 > num_handovers, "each way is taken often");
  }
  std::printf("\n");
}

}  // namespace aegaeon::tests
