// Random pieces against an oracle that knows every unit of the range: who has it, and what best fit
// would take.
#include "tests/support.hpp"
#include "vmm/suballocator.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kUnit = Suballocator::kAlignment;

class Oracle {
 public:
  explicit Oracle(std::size_t num_units) : taken_(num_units, false) {}

  // (size, offset) of every maximal run of free units, in units, smallest first.
  [[nodiscard]] std::vector<std::pair<std::size_t, std::size_t>> holes() const {
    std::vector<std::pair<std::size_t, std::size_t>> holes;
    for (std::size_t at = 0; at < taken_.size();) {
      auto end = at;
      while (end < taken_.size() && !taken_[end]) ++end;
      if (end > at) holes.emplace_back(end - at, at);
      at = std::max(end, at + 1);
    }
    std::sort(holes.begin(), holes.end());
    return holes;
  }

  void set(Range const& range, bool taken) {
    for (std::size_t i = 0; i < range.size_bytes / kUnit; ++i) {
      auto unit = range.offset_bytes / kUnit + i;
      require(taken_[unit] != taken, "a unit is taken once and freed once");
      taken_[unit] = taken;
    }
  }

  [[nodiscard]] std::size_t allocated_bytes() const {
    return static_cast<std::size_t>(std::count(taken_.begin(), taken_.end(), true)) * kUnit;
  }

 private:
  std::vector<bool> taken_;
};

void run(std::uint32_t seed) {
  Random random(seed);
  std::size_t num_units = 1 + random.below(200);
  auto slack = random.below(kUnit);  // a range need not be a multiple of the alignment
  Suballocator pieces(num_units * kUnit + slack);
  Oracle oracle(num_units);
  std::map<std::size_t, std::size_t> live;  // offset: size
  for (int step = 0; step < 2000; ++step) {
    auto holes = oracle.holes();
    require(pieces.free_ranges().size() == holes.size(), "free neighbours are one piece");
    require(pieces.largest_free_bytes() == (holes.empty() ? 0 : holes.back().first * kUnit),
            "the largest free piece is known");
    require(pieces.allocated_bytes() == oracle.allocated_bytes(), "bytes are counted");
    require(pieces.num_pieces() == live.size(), "pieces are counted");
    if (random.below(100) < 55) {
      auto bytes = 1 + random.below((1 + random.below(num_units / 4 + 1)) * kUnit);
      auto units = (bytes + kUnit - 1) / kUnit;
      auto hole =
          std::find_if(holes.begin(), holes.end(), [&](auto const& h) { return h.first >= units; });
      auto promised = pieces.best_fit(bytes);
      auto got = pieces.allocate(bytes);
      require(got.has_value() == (hole != holes.end()), "what fits is given, what does not is not");
      require(promised.has_value() == got.has_value(), "best_fit promises what allocate keeps");
      if (!got) continue;
      require(*promised == hole->first * kUnit, "best_fit names the smallest hole");
      require(got->offset_bytes == hole->second * kUnit && got->size_bytes == units * kUnit,
              "the low end of the smallest hole is taken");
      oracle.set(*got, true);
      live.emplace(got->offset_bytes, got->size_bytes);
    } else if (!live.empty()) {
      auto it = live.begin();
      std::advance(it, static_cast<std::ptrdiff_t>(random.below(live.size())));
      oracle.set({it->first, it->second}, false);
      auto whole = pieces.free(it->first);
      require(whole.offset_bytes <= it->first &&
                  it->first + it->second <= whole.offset_bytes + whole.size_bytes,
              "the free piece holds what was freed");
      bool known = false;
      for (auto [size, offset] : oracle.holes()) {
        known = known || (offset * kUnit == whole.offset_bytes && size * kUnit == whole.size_bytes);
      }
      require(known, "the free piece is all there is around");
      live.erase(it);
    }
  }
  for (auto [offset, size] : live) static_cast<void>(pieces.free(offset));
  require(pieces.free_ranges().size() == 1 && pieces.largest_free_bytes() == num_units * kUnit,
          "in the end all is one piece");
}

}  // namespace

void suballocator_random(std::size_t num_seeds) {
  for (std::uint32_t seed = 0; seed < num_seeds; ++seed) run(seed);
  Suballocator empty(kUnit - 1);
  require(!empty.allocate(1), "less than a unit holds nothing");
  require(!Suballocator(kUnit).allocate(std::numeric_limits<std::size_t>::max()),
          "a size that rounds over the edge does not fit");
  Suballocator one(kUnit);
  for (std::size_t unknown : {std::size_t{0}, kUnit}) {
    bool refused = false;
    try {
      static_cast<void>(one.free(unknown));
    } catch (std::invalid_argument const&) {
      refused = true;
    }
    require(refused, "freeing what is no piece is refused");
  }
}

}  // namespace aegaeon::tests
