// The time that a driver's streams run by: the machine's, or that of a simulation.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace aegaeon {

using Clock = std::chrono::steady_clock;

class TimeSource {
 public:
  TimeSource() = default;
  virtual ~TimeSource() = default;
  TimeSource(TimeSource const&) = delete;  // there is one time
  TimeSource& operator=(TimeSource const&) = delete;

  [[nodiscard]] virtual Clock::time_point now() noexcept = 0;
  // Until the condition is notified or that time has come (max(): until notified). May return for
  // no reason, like the condition's own wait.
  virtual void wait(std::unique_lock<std::mutex>& lock, std::condition_variable& condition,
                    Clock::time_point until) = 0;
};

class SteadyTime final : public TimeSource {
 public:
  [[nodiscard]] Clock::time_point now() noexcept override { return Clock::now(); }
  void wait(std::unique_lock<std::mutex>& lock, std::condition_variable& condition,
            Clock::time_point until) override {
    if (until == Clock::time_point::max()) {
      condition.wait(lock);
    } else {
      condition.wait_until(lock, until);
    }
  }
};

inline TimeSource& steady_time() noexcept {
  static SteadyTime time;
  return time;
}

}  // namespace aegaeon
