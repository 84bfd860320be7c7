// Prefetcher: moves bytes between host images and regions from a native thread of its own, in
// chunks, most urgent first. It owns one stream per direction: the copy engines have no priorities,
// so control means few small chunks in flight and a host that decides what is next.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include <sys/types.h>

#include "driver/driver.hpp"
#include "driver/stream.hpp"
#include "transfer/duration_histogram.hpp"
#include "transfer/rate_limit.hpp"
#include "transfer/ticket.hpp"

namespace aegaeon {

struct DirectionStats {
  std::uint64_t bytes = 0;
  std::uint64_t num_chunks = 0;
  std::uint64_t num_copies = 0;
  double busy_s = 0;       // with at least one chunk in flight
  double throttled_s = 0;  // with a chunk that the rate limit alone held back
  TransferOutcomes outcomes;
  std::map<std::int64_t, DurationHistogram> queue_waits;  // until the first chunk, by priority
  DurationHistogram cancel_latencies;                     // of those with chunks in flight
};

struct PrefetcherOptions {
  std::size_t chunk_bytes = 0;
  std::size_t depth = 0;                              // chunks in flight per direction
  std::optional<double> max_bytes_per_s{};            // per direction
  std::optional<std::int64_t> cap_exempt_priority{};  // up to this one no limit holds
};

struct TransferOptions {
  std::int64_t priority = 0;
  std::optional<Clock::duration> deadline{};  // from now; orders within the priority
  // Which pieces, in that order (none: the whole image, at the same offsets), and how many of them
  // end with each layer; see TransferOrder.
  std::optional<std::vector<Piece>> order{};
  std::optional<std::vector<std::size_t>> layer_ends{};
  std::optional<StreamId> after{};  // what is on that stream now comes first
};

class Prefetcher {
 public:
  // Throws DriverError, and std::invalid_argument for sizes and rates that are not positive.
  Prefetcher(std::shared_ptr<Driver> driver, PrefetcherOptions const& options);
  ~Prefetcher();
  Prefetcher(Prefetcher const&) = delete;  // owns a thread
  Prefetcher& operator=(Prefetcher const&) = delete;

  // Throws std::invalid_argument for a bad order, LifecycleError where the region is not mapped or
  // the stream is in capture, DriverError.
  std::shared_ptr<Ticket> submit(Direction direction, std::shared_ptr<HostImage> image,
                                 std::shared_ptr<Region> region, TransferOptions options);
  // From the next chunk on.
  void set_rate(Direction direction, std::optional<double> max_bytes_per_s);
  void set_chunk_bytes(std::size_t chunk_bytes);
  [[nodiscard]] DirectionStats stats(Direction direction) const;
  // Cancels what is queued, waits for what is in flight, joins the thread. On DriverError it may be
  // called again.
  void close();

 private:
  struct Chunk {
    std::shared_ptr<Ticket> ticket;
    std::size_t bytes = 0;
    std::optional<std::size_t> event_idx;  // none: it could not be recorded
    Result result = kSuccess;              // of its submission
    char const* call = "";
  };
  struct Lane {
    std::unique_ptr<Stream> stream;
    std::vector<std::unique_ptr<Event>> events;  // chunk n uses event n modulo depth
    std::size_t next_event = 0;
    std::deque<Chunk> in_flight;
    Clock::time_point busy_since{};
    Clock::time_point front_since{};  // the oldest chunk in flight has had the engine since then
    RateLimit limit;
    std::optional<Clock::time_point> throttled_since;
    DirectionStats stats;
    // What the unconfirmed copies of failed transfers still need; see retry_limbo().
    std::vector<TransferHolds> limbo;
  };
  using Lock = std::unique_lock<std::mutex>;

  void run();
  void open_gates(Lock& lock, Clock::time_point& wake_at);
  bool submit_chunk(Lock& lock, Direction direction, Clock::time_point& wake_at);
  [[nodiscard]] bool exempt(Ticket const& ticket) const;
  static void end_throttling(Lane& lane, Clock::time_point now);
  Lane* next_to_finish();
  void reap(Lock& lock, Lane& lane);
  void fail(Ticket& ticket, std::exception_ptr error);
  void fail_queued(Lock& lock, std::exception_ptr const& error);
  void finish(Lock& lock, Ticket& ticket, Lane* limbo);
  bool retry_limbo(Lock& lock);
  void require_open() const;
  [[nodiscard]] std::exception_ptr error_of(Result result, char const* call,
                                            std::size_t bytes) const;

  std::shared_ptr<Driver> const driver_;
  TimeSource& time_;
  std::size_t const depth_;
  std::optional<std::int64_t> const cap_exempt_priority_;
  std::shared_ptr<TransferQueue> const queue_;
  // Guarded by the queue's mutex, but for the streams and events:
  std::size_t chunk_bytes_;
  std::array<Lane, kNumDirections> lanes_;
  // Of the last ten chunks or so, in either direction; at first a guess that carries no weight.
  double recent_bytes_ = 1;
  double recent_s_ = 1e-9;
  std::mutex close_mutex_;
  pid_t const process_;
  std::thread thread_;
};

}  // namespace aegaeon
