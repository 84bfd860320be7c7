// RateLimit: a token bucket for chunks, kept as the time at which the next chunk may go (the
// "virtual scheduling" form of the generic cell rate algorithm, ITU-T I.371). Knows no clock.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <optional>

#include "driver/clock.hpp"

namespace aegaeon {

class RateLimit {
 public:
  // No rate: unlimited. What was sent before counts on, at the new rate.
  void set_rate(std::optional<double> bytes_per_s, Clock::time_point now) {
    auto owed = bytes_per_s && bytes_per_s_ && next_ > now
                    ? std::chrono::duration<double>(next_ - now) * (*bytes_per_s_ / *bytes_per_s)
                    : std::chrono::duration<double>::zero();
    next_ = now + round_up(owed);
    bytes_per_s_ = bytes_per_s;
  }

  [[nodiscard]] bool limited() const noexcept { return bytes_per_s_.has_value(); }
  // Before this time nothing may go.
  [[nodiscard]] Clock::time_point next() const noexcept { return next_; }

  // A chunk goes now. One that goes late may be followed that much earlier, by at most the time of
  // one chunk: a thread that wakes up late costs no rate, and idling saves up one chunk only.
  void take(std::size_t bytes, Clock::time_point now) {
    if (!bytes_per_s_) return;
    auto cost = round_up(std::chrono::duration<double>(static_cast<double>(bytes) / *bytes_per_s_));
    next_ = std::max(next_, now - cost) + cost;
  }

 private:
  static Clock::duration round_up(std::chrono::duration<double> time) {
    constexpr std::chrono::duration<double> kLongest{1e9};  // far from the clock's end
    return std::chrono::ceil<Clock::duration>(std::min(time, kLongest));
  }

  std::optional<double> bytes_per_s_;
  Clock::time_point next_ = Clock::time_point::min();
};

}  // namespace aegaeon
