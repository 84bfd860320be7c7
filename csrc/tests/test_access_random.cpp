// Random windows, protections and transfers of a region against a model of who may write where.
#include <algorithm>
#include <optional>
#include <utility>

#include "tests/support.hpp"
#include "vmm/arena.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kRegion = 12;  // granules, each a handle of its own

struct Model {
  struct Granule {
    bool mapped = false;
    bool read_only = false;
    std::size_t num_writers = 0;
  };
  std::array<Granule, kRegion> granules;
  std::size_t num_windows = 0;

  [[nodiscard]] bool open(Granule const& granule) const {
    return !granule.read_only || num_windows != 0 || granule.num_writers != 0;
  }
};

struct Span {
  std::size_t begin = 0, end = 0;  // in granules
  [[nodiscard]] Range range() const { return {begin * kPage, (end - begin) * kPage}; }
};

Span random_span(Random& random) {
  auto begin = random.below(kRegion);
  return {begin, begin + 1 + random.below(std::min<std::size_t>(kRegion - begin, 4))};
}

struct Transfer {
  std::unique_ptr<Region::Use> use;
  std::vector<std::size_t> written;  // granules, each once
};

class Game {
 public:
  explicit Game(std::uint32_t seed) : random_(seed) {
    require(driver_->stream_create(&stream_) == kSuccess, "a stream");
  }
  void play(int num_steps, bool faults) {
    for (int step = 0; step < num_steps; ++step) {
      bool faulty = faults && random_.one_in(4);
      if (faulty) driver_->fail_call(1 + random_.below(3), std::nullopt, 719, random_.one_in(4));
      act();
      driver_->reset();
      had_faults_ = had_faults_ || faulty;
      compare();
    }
    while (!transfers_.empty()) end_transfer();
    while (model_.num_windows != 0) close_window();
    region_->protect(0, std::nullopt, false);
    region_->protect(0, std::nullopt, true);
    had_faults_ = false;  // by now all of it is made good
    for (auto& granule : model_.granules) granule.read_only = true;
    compare();
  }
  void end() {
    region_->close();
    arena_->close();
    region_.reset();
    arena_.reset();
    require(driver_->stream_destroy(stream_) == kSuccess, "the end of a stream");
    require_nothing_alive(*driver_);
  }

 private:
  bool all_mapped(Span const& span) const {
    return std::all_of(model_.granules.begin() + span.begin, model_.granules.begin() + span.end,
                       [](auto const& granule) { return granule.mapped; });
  }

  void act() {
    auto span = random_span(random_);
    auto range = span.range();
    bool flag = random_.one_in(2);
    switch (random_.below(7)) {
      case 0:
        if (attempt([&] {
              region_->map(range.offset_bytes, range.size_bytes,
                           random_.one_in(2) ? Contents::kPoison : Contents::kZero, flag);
            })) {
          for (auto i = span.begin; i < span.end; ++i) model_.granules[i] = {true, flag, 0};
        }
        break;
      case 1:
        if (attempt([&] { region_->unmap(range.offset_bytes, range.size_bytes); })) {
          require(transfers_.empty(), "nothing goes while a transfer is in flight");
          for (auto i = span.begin; i < span.end; ++i) model_.granules[i] = {};
        }
        break;
      case 2:
        if (attempt([&] { region_->protect(range.offset_bytes, range.size_bytes, flag); })) {
          for (auto i = span.begin; i < span.end; ++i) model_.granules[i].read_only = flag;
        }
        break;
      case 3:
        if (attempt([&] { region_->open_window(); })) ++model_.num_windows;
        break;
      case 4:
        if (model_.num_windows != 0) close_window();
        break;
      case 5:
        begin_transfer();
        break;
      case 6:
        if (!transfers_.empty() && random_.one_in(2)) end_transfer();
        break;
    }
  }

  template <typename Operation>
  bool attempt(Operation operation) {
    try {
      operation();
      return true;
    } catch (Error const&) {
      return false;
    }
  }

  void close_window() {
    --model_.num_windows;  // whether or not the driver follows
    attempt([&] { region_->close_window(); });
  }

  void begin_transfer() {
    std::vector<Range> ranges;
    std::vector<std::size_t> written;
    bool writes = !random_.one_in(4), possible = true;
    for (auto n = 1 + random_.below(4); n > 0; --n) {
      auto span = random_span(random_);
      possible = possible && all_mapped(span);
      // Pieces of granules, some of them of the same.
      ranges.push_back({span.begin * kPage + 512 * random_.below(8), 256});
      ranges.push_back({span.begin * kPage + 8, (span.end - span.begin) * kPage - 8});
      for (auto i = span.begin; i < span.end; ++i) {
        if (writes) written.push_back(i);
        if (writes && model_.granules[i].read_only && model_.num_windows == 0) possible = false;
      }
    }
    std::sort(written.begin(), written.end());
    written.erase(std::unique(written.begin(), written.end()), written.end());
    std::unique_ptr<Region::Use> use;
    bool began = attempt([&] { use = region_->use(ranges, writes); });
    require(began == possible, "a transfer needs memory, and a window where that is read-only");
    if (!began) return;
    for (auto i : written) ++model_.granules[i].num_writers;
    transfers_.push_back({std::move(use), std::move(written)});
  }

  void end_transfer() {
    std::swap(transfers_[random_.below(transfers_.size())], transfers_.back());
    for (auto i : transfers_.back().written) --model_.granules[i].num_writers;
    transfers_.pop_back();
  }

  void compare() {
    for (std::size_t i = 0; i < kRegion; ++i) {
      auto const& granule = model_.granules[i];
      auto address = region_->address() + i * kPage;
      auto byte = granule.mapped ? *pointer(address) : std::byte{};
      bool writable = driver_->memcpy_h2d_async(address, &byte, 1, stream_) == kSuccess;
      require(driver_->stream_synchronize(stream_) == kSuccess, "the copy is over");
      if (!granule.mapped) {
        require(!writable, concat("granule ", i, " is not there"));
      } else if (model_.open(granule)) {
        require(writable, concat("granule ", i, " can be written"));
      } else {
        require(!writable || had_faults_, concat("granule ", i, " is read-only"));
      }
    }
  }

  Random random_;
  std::shared_ptr<FaultyDriver> driver_ =
      std::make_shared<FaultyDriver>(make_host_driver(2 * kRegion * kPage, true, kPage));
  std::shared_ptr<Arena> arena_ = std::make_shared<Arena>(driver_, 2 * kRegion * kPage, kPage);
  std::shared_ptr<Region> region_ = arena_->reserve(kRegion * kPage, "owner", "t");
  StreamId stream_ = 0;
  Model model_;
  std::vector<Transfer> transfers_;
  bool had_faults_ = false;
};

}  // namespace

void access_random(std::size_t num_games) {
  for (std::uint32_t seed = 0; seed < num_games; ++seed) {
    Game game(seed);
    try {
      game.play(150, seed % 2 == 1);
      game.end();
    } catch (std::logic_error const& error) {
      throw std::logic_error(concat("seed ", seed, ": ", error.what()));
    }
  }
}

}  // namespace aegaeon::tests
