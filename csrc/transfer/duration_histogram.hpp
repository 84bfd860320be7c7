// DurationHistogram: how often something took how long, in buckets of an eighth of a power of two
// of nanoseconds, so that a quantile is at most an eighth too long.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "driver/clock.hpp"

namespace aegaeon {

class DurationHistogram {
 public:
  void add(Clock::duration duration) {
    auto value = static_cast<std::uint64_t>(std::max<std::int64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count(), 0));
    ++buckets_[bucket_of(value)];
    ++num_;
    total_ns_ += value;
    max_ns_ = std::max(max_ns_, value);
  }

  [[nodiscard]] std::uint64_t num() const noexcept { return num_; }
  [[nodiscard]] double total_s() const noexcept { return seconds(total_ns_); }
  [[nodiscard]] double max_s() const noexcept { return seconds(max_ns_); }
  // So many of them (0..1) took at most so long; 0 when there were none.
  [[nodiscard]] double quantile_s(double share) const noexcept {
    auto rank = static_cast<std::uint64_t>(std::ceil(share * static_cast<double>(num_)));
    std::uint64_t seen = 0;
    for (std::size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
      seen += buckets_[bucket];
      if (seen >= rank && seen != 0) return seconds(std::min(last_of(bucket), max_ns_));
    }
    return 0;
  }

 private:
  static constexpr int kBits = 3;  // of a bucket's place within its power of two
  static constexpr std::uint64_t kPerPower = 1u << kBits;

  static std::size_t bucket_of(std::uint64_t value) {
    if (value < kPerPower) return value;
    auto shift = static_cast<std::uint64_t>(std::bit_width(value)) - kBits - 1;
    return (shift + 1) * kPerPower + ((value >> shift) & (kPerPower - 1));
  }
  static std::uint64_t last_of(std::size_t bucket) {
    if (bucket < kPerPower) return bucket;
    auto shift = bucket / kPerPower - 1;
    return ((kPerPower + bucket % kPerPower + 1) << shift) - 1;
  }
  static double seconds(std::uint64_t ns) { return static_cast<double>(ns) * 1e-9; }

  std::array<std::uint64_t, (64 - kBits) * kPerPower> buckets_{};
  std::uint64_t num_ = 0;
  std::uint64_t total_ns_ = 0;
  std::uint64_t max_ns_ = 0;
};

}  // namespace aegaeon
