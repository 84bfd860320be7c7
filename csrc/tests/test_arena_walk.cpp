// A random walk of an arena beside a model of it that is a few maps: what every page must hold, who
// owns how much, what each plan must answer. After every step all of it is compared, every byte of
// every mapped page too. The driver fails now and then: once, for good, or again on the way back.
#include <map>
#include <utility>

#include "tests/support.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kCapacity = 24, kRegion = 16, kNumRegions = 4;  // in pages
constexpr std::size_t kWords = kPage / sizeof(std::uint64_t);
constexpr std::uint64_t kPoisonWord = ~std::uint64_t{0};

struct Page {
  std::size_t handle_begin = 0;  // the page that its handle starts at
  std::uint64_t word = 0;        // what it is full of
  bool read_only = false;
  bool operator==(Page const&) const = default;
};
using Pages = std::map<std::size_t, Page>;

struct Action {
  bool maps = false;
  std::size_t region_idx = 0;
  std::size_t begin = 0;
  std::size_t count = 0;  // 0: of an unmap, all there is
  Contents contents = Contents::kZero;
  bool read_only = false;
};

enum class Answer { kDone, kLifecycleError, kOutOfMemory };

class Walk {
 public:
  explicit Walk(std::uint32_t seed)
      : random_(seed),
        driver_(std::make_shared<FaultyDriver>(
            make_host_driver(kCapacity * kPage, seed % 2 == 0, kPage))),
        handle_(1 + random_.below(5)),
        poison_(seed % 3 == 2),
        arena_(std::make_shared<Arena>(driver_, kCapacity * kPage, handle_ * kPage, poison_)) {
    for (std::size_t i = 0; i < kNumRegions; ++i) regions_.push_back(reserve(i));
  }

  void step() {
    if (random_.one_in(40)) {
      reopen(random_.below(kNumRegions));
    } else {
      plan(1 + (random_.one_in(3) ? random_.below(3) : 0));
    }
    check();
    ++num_steps_;
  }

  void finish() {
    if (random_.one_in(2)) arena_->close();
    regions_.clear();
    arena_.reset();
    require_nothing_alive(*driver_);
  }

 private:
  // Two regions have the same owner, by different tags.
  static std::size_t owner_of(std::size_t region_idx) { return region_idx % 3; }

  std::shared_ptr<Region> reserve(std::size_t i) {
    return arena_->reserve(kRegion * kPage, concat("owner", owner_of(i)), concat("tag", i));
  }

  void reopen(std::size_t i) {
    regions_[i]->close();
    regions_[i] = reserve(i);
    pages_[i].clear();
  }

  std::vector<Action> random_actions(std::size_t count) {
    std::vector<Action> actions;
    for (std::size_t i = 0; i < count; ++i) {
      Action action{.maps = random_.one_in(2), .region_idx = random_.below(kNumRegions)};
      action.begin = random_.below(kRegion);
      action.count = std::min(1 + random_.below(kRegion), kRegion - action.begin);
      if (action.maps) {
        if (random_.one_in(4)) action.contents = Contents::kPoison;
        if (random_.one_in(4)) action.contents = Contents::kPreserve;
        action.read_only = random_.one_in(8);
      } else if (random_.one_in(2)) {
        action.begin = action.count = 0;
      } else if (random_.one_in(2)) {
        align(action);
      }
      actions.push_back(action);
    }
    return actions;
  }

  // To handles that are there, so that cutting one is not the rule.
  void align(Action& action) const {
    auto const& pages = pages_[action.region_idx];
    auto first = pages.lower_bound(action.begin);
    if (first == pages.end()) return;
    action.begin = first->second.handle_begin;
    auto end = action.begin;
    while (pages.contains(end) &&
           (end < action.begin + action.count || pages.at(end).handle_begin != end)) {
      ++end;
    }
    action.count = end - action.begin;
  }

  void plan(std::size_t num_actions) {
    auto actions = random_actions(num_actions);
    auto after = pages_;
    auto expected = simulate(actions, after);
    std::vector<Step> steps;
    for (auto const& action : actions) {
      auto kind = action.maps ? Step::Kind::kMap : Step::Kind::kUnmap;
      auto size = action.count == 0 ? std::nullopt : std::optional(action.count * kPage);
      steps.push_back({kind, regions_[action.region_idx], action.begin * kPage, size,
                       action.contents, action.read_only});
    }
    bool faulty = random_.one_in(5), persistent = false;
    if (faulty) {
      static constexpr std::array<Result, 4> kCodes{1, 2, 700, 719};
      persistent = random_.one_in(4);
      auto n = 1 + random_.below(14);
      driver_->fail_call(n, std::nullopt, kCodes[random_.below(kCodes.size())], persistent);
      if (random_.one_in(3)) driver_->also_fail_call(n + 1 + random_.below(6), random_.one_in(3));
    }
    try {
      arena_->commit(std::move(steps));
      require(expected == Answer::kDone, "the model does not allow this plan");
      driver_->reset();
      pages_ = std::move(after);
      arrive(actions);
    } catch (LifecycleError const& error) {
      require(expected == Answer::kLifecycleError, error.what());
    } catch (DriverError const& error) {
      auto const* short_of = dynamic_cast<OutOfMemory const*>(&error);
      if (short_of != nullptr && short_of->shortage) {
        require(expected == Answer::kOutOfMemory, error.what());
      } else {
        require(faulty && expected == Answer::kDone, error.what());
        driver_->reset();
        survive(actions, error);
      }
    }
    driver_->reset();
  }

  // What the plan must answer, and `pages` after it.
  Answer simulate(std::vector<Action>& actions, std::array<Pages, kNumRegions>& pages) const {
    std::vector<std::ptrdiff_t> changes;
    for (auto& action : actions) {
      auto& mine = pages[action.region_idx];
      if (action.maps) {
        for (auto i = action.begin; i < action.begin + action.count; ++i) {
          if (mine.contains(i)) return Answer::kLifecycleError;
        }
        add(mine, action);
        changes.push_back(static_cast<std::ptrdiff_t>(action.count));
        continue;
      }
      auto begin = action.count == 0 ? 0 : action.begin;
      auto end = action.count == 0 ? kRegion : begin + action.count;
      std::ptrdiff_t removed = 0;
      for (auto i = begin; i < end; ++i) {
        if (!mine.contains(i)) {
          if (action.count != 0) return Answer::kLifecycleError;
          continue;
        }
        ++removed;
        auto handle_begin = mine.at(i).handle_begin;
        bool cut_after = mine.contains(end) && mine.at(end).handle_begin == handle_begin;
        if (handle_begin < begin || cut_after) return Answer::kLifecycleError;
      }
      if (removed == 0) return Answer::kLifecycleError;
      mine.erase(mine.lower_bound(begin), mine.lower_bound(end));
      changes.push_back(-removed);
    }
    auto used = static_cast<std::ptrdiff_t>(num_mapped());
    for (auto change : changes) {
      used += change;
      if (used > static_cast<std::ptrdiff_t>(kCapacity)) return Answer::kOutOfMemory;
    }
    return Answer::kDone;
  }

  void add(Pages& pages, Action const& action) const {
    auto end = action.begin + action.count;
    for (auto at = action.begin; at < end;) {
      auto size = at % handle_ == 0 && end - at >= handle_ ? handle_ : 1;
      for (std::size_t i = at; i < at + size; ++i) {
        pages[i] = {.handle_begin = at, .word = 0, .read_only = action.read_only};
      }
      at += size;
    }
  }

  [[nodiscard]] std::size_t num_mapped() const {
    std::size_t sum = 0;
    for (auto const& pages : pages_) sum += pages.size();
    return sum;
  }

  // Looks at what has just been mapped before anybody writes to it, then gives it words of its own.
  void arrive(std::vector<Action> const& actions) {
    for (std::size_t i = 0; i < actions.size(); ++i) {
      auto const& action = actions[i];
      if (!action.maps) continue;
      for (auto at = action.begin; at < action.begin + action.count; ++at) {
        bool is_last = true;  // a later step of the plan may have unmapped it, and mapped it again
        for (auto later = i + 1; later < actions.size(); ++later) {
          is_last = is_last && actions[later].region_idx != action.region_idx;
        }
        if (is_last && pages_[action.region_idx].contains(at)) look_at_new_page(action, at);
      }
    }
    for (std::size_t r = 0; r < kNumRegions; ++r) {
      for (auto const& [at, page] : pages_[r]) {
        if (page.word == 0) to_write_.emplace_back(r, at);
      }
    }
    write();
  }

  void look_at_new_page(Action const& action, std::size_t at) const {
    bool poisoned =
        action.contents == Contents::kPoison || (poison_ && action.contents == Contents::kPreserve);
    if (action.contents == Contents::kPreserve && !poisoned) return;
    auto const* words = page_words(action.region_idx, at);
    std::size_t num_wrong = 0;
    for (std::size_t i = 0; i < kWords; ++i) {
      bool own = words[i] >> 48 == owner_of(action.region_idx) + 1;
      num_wrong += poisoned ? words[i] != kPoisonWord
                            : words[i] != 0 && !own &&
                                  !((poison_ || poison_left_) && words[i] == kPoisonWord);
    }
    require(num_wrong == 0,
            concat("step ", num_steps_, ": page ", at, " of region ", action.region_idx,
                   ", new, shows nothing of another owner, but ", std::hex, words[0],
                   " with contents ", static_cast<int>(action.contents)));
  }

  void write() {
    for (auto const& [r, at] : std::exchange(to_write_, {})) {
      auto& page = pages_[r].at(at);
      page.word = (std::uint64_t{owner_of(r) + 1} << 48) + ++next_word_;
      if (page.read_only) regions_[r]->open_window();
      std::fill_n(page_words(r, at), kWords, page.word);
      if (page.read_only) regions_[r]->close_window();
    }
  }

  // A driver call has failed: all is as before, but for what the error names. The driver works
  // again.
  void survive(std::vector<Action> const& actions, DriverError const& error) {
    std::vector<std::vector<std::size_t>> mapped;
    for (auto const& region : regions_) mapped.push_back(granules(region->mapped_ranges()));
    auto lose = [&](RegionRange const& lost) {
      auto r = region_of(lost);
      require(touched(actions, r), "only what the plan touches is at risk");
      auto end = (lost.offset_bytes + lost.size_bytes) / kPage;
      for (auto at = lost.offset_bytes / kPage; at < end; ++at) {
        if (std::ranges::binary_search(mapped[r], at)) {
          if (pages_[r].contains(at)) to_write_.emplace_back(r, at);
        } else {
          forget(r, at);
        }
      }
    };
    // Its bytes may have arrived all the same, in handles that nobody has owned yet.
    poison_left_ = poison_left_ || std::ranges::any_of(actions, [](auto const& action) {
                     return action.contents == Contents::kPoison;
                   });
    for (auto const& lost : error.quarantined) lose(lost);
    for (auto const& lost : error.lost_contents) lose(lost);
    write();
    // Any call brings the quarantined memory back, now that the driver works.
    auto spare = arena_->reserve(kPage, "spare", "t");
    if (num_mapped() < kCapacity) {
      spare->map(0, std::nullopt);
      require(arena_->stats().quarantined_bytes == 0, "a driver that works heals all");
    }
  }

  // A page that is not mapped any more; what is left of a slot of small handles can be unmapped
  // one by one.
  void forget(std::size_t region_idx, std::size_t at) {
    auto& pages = pages_[region_idx];
    auto found = pages.find(at);
    if (found == pages.end()) return;
    auto handle_begin = found->second.handle_begin;
    pages.erase(found);
    for (auto& [i, page] : pages) {
      if (page.handle_begin == handle_begin) page.handle_begin = i;
    }
  }

  static bool touched(std::vector<Action> const& actions, std::size_t region_idx) {
    return std::ranges::any_of(actions,
                               [&](auto const& action) { return action.region_idx == region_idx; });
  }

  [[nodiscard]] std::size_t region_of(RegionRange const& range) const {
    for (std::size_t r = 0; r < kNumRegions; ++r) {
      if (regions_[r]->owner() == range.owner && regions_[r]->tag() == range.tag) return r;
    }
    throw std::logic_error(concat("an error names '", range.owner, "', which is nobody"));
  }

  [[nodiscard]] std::uint64_t* page_words(std::size_t region_idx, std::size_t at) const {
    return reinterpret_cast<std::uint64_t*>(regions_[region_idx]->address() + at * kPage);
  }

  void check() const {
    require_ledger(*arena_);
    auto stats = arena_->stats();
    require(stats.free_bytes + stats.quarantined_bytes == (kCapacity - num_mapped()) * kPage,
            "what is not mapped is free");
    std::map<Holder, std::size_t> owners;
    for (std::size_t r = 0; r < kNumRegions; ++r) {
      auto const& region = *regions_[r];
      if (!pages_[r].empty()) owners[{region.owner(), region.tag()}] = pages_[r].size() * kPage;
      require(granules(region.mapped_ranges()) == keys(pages_[r], false),
              "mapped is what was mapped");
      require(granules(region.read_only_ranges()) == keys(pages_[r], true), "so is its protection");
      for (auto const& [at, page] : pages_[r]) {
        auto const* words = page_words(r, at);
        std::uint64_t difference = 0;
        for (std::size_t i = 0; i < kWords; ++i) difference |= words[i] ^ page.word;
        if (difference == 0) continue;
        require(false, concat("step ", num_steps_, ": page ", at, " of region ", r,
                              " holds other bytes than were written"));
      }
    }
    require(owners == stats.owners, "who owns how much is what was mapped");
  }

  static std::vector<std::size_t> granules(std::vector<Range> const& ranges) {
    std::vector<std::size_t> result;
    for (auto const& range : ranges) {
      for (auto at = range.offset_bytes; at < range.end(); at += kPage)
        result.push_back(at / kPage);
    }
    return result;
  }

  static std::vector<std::size_t> keys(Pages const& pages, bool read_only) {
    std::vector<std::size_t> result;
    for (auto const& [at, page] : pages) {
      if (page.read_only || !read_only) result.push_back(at);
    }
    return result;
  }

  Random random_;
  std::shared_ptr<FaultyDriver> driver_;
  std::size_t const handle_;  // pages
  bool const poison_;
  std::shared_ptr<Arena> arena_;
  std::vector<std::shared_ptr<Region>> regions_;
  std::array<Pages, kNumRegions> pages_;
  std::vector<std::pair<std::size_t, std::size_t>> to_write_;
  bool poison_left_ = false;
  std::uint64_t next_word_ = 0;
  std::size_t num_steps_ = 0;
};

}  // namespace

void arena_walk(std::size_t num_steps) {
  constexpr std::size_t kStepsOfOne = 20'000;
  for (std::uint32_t seed = 0; seed * kStepsOfOne < num_steps; ++seed) {
    Walk walk(seed);
    auto left = std::min(kStepsOfOne, num_steps - seed * kStepsOfOne);
    try {
      for (std::size_t i = 0; i < left; ++i) walk.step();
      walk.finish();
    } catch (std::exception const& error) {
      throw std::logic_error(concat("seed ", seed, ": ", error.what()));
    }
  }
}

}  // namespace aegaeon::tests
