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
#include "transfer/stream.hpp"
#include "transfer/ticket.hpp"

namespace aegaeon {

struct QueueWait {
  std::uint64_t num_transfers = 0;
  double total_s = 0;
  double max_s = 0;
};

struct DirectionStats {
  std::uint64_t bytes = 0;
  std::uint64_t num_chunks = 0;
  std::uint64_t num_copies = 0;
  double busy_s = 0;                              // with at least one chunk in flight
  std::map<std::int64_t, QueueWait> queue_waits;  // by priority
};

class Prefetcher {
 public:
  // depth: chunks in flight per direction. Throws DriverError.
  Prefetcher(std::shared_ptr<Driver> driver, std::size_t chunk_bytes, std::size_t depth);
  ~Prefetcher();
  Prefetcher(Prefetcher const&) = delete;  // owns a thread
  Prefetcher& operator=(Prefetcher const&) = delete;

  // Queues a transfer of the pieces (none: the whole image, at the same offsets), in that order.
  // Throws std::invalid_argument for pieces that are empty, lie outside or overlap where they are
  // written, and LifecycleError where the region is not mapped.
  std::shared_ptr<Ticket> submit(Direction direction, std::shared_ptr<HostImage> image,
                                 std::shared_ptr<Region> region, std::int64_t priority,
                                 std::optional<std::vector<Piece>> order);
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
    std::uint64_t sequence = 0;
  };
  struct Lane {
    std::unique_ptr<Stream> stream;
    std::vector<std::unique_ptr<Event>> events;  // chunk n uses event n modulo depth
    std::size_t next_event = 0;
    std::deque<Chunk> in_flight;
    Clock::time_point busy_since{};
    DirectionStats stats;
    // What the unconfirmed copies of failed transfers still need; see retry_limbo().
    std::vector<TransferHolds> limbo;
  };
  using Lock = std::unique_lock<std::mutex>;

  void run();
  bool submit_chunk(Lock& lock, Direction direction);
  Lane* oldest_in_flight();
  void reap(Lock& lock, Lane& lane);
  void fail(Ticket& ticket, std::exception_ptr error);
  void finish(Lock& lock, Ticket& ticket, Lane* limbo);
  bool retry_limbo(Lock& lock);
  void require_open() const;

  std::shared_ptr<Driver> const driver_;
  std::size_t const chunk_bytes_;
  std::size_t const depth_;
  std::shared_ptr<TransferQueue> const queue_;
  std::array<Lane, kNumDirections> lanes_;  // guarded by the queue's mutex, but for the streams
  std::uint64_t next_sequence_ = 0;
  std::mutex close_mutex_;
  pid_t const process_;
  std::thread thread_;
};

}  // namespace aegaeon
