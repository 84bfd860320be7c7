// Ticket: one transfer of a prefetcher, as its user sees it. TransferQueue: what the prefetcher's
// thread, its tickets and those who submit share.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "driver/clock.hpp"
#include "driver/stream.hpp"
#include "transfer/host_image.hpp"
#include "transfer/transfer_order.hpp"
#include "vmm/arena.hpp"

namespace aegaeon {

// DRAINING: cancelled or failed, with chunks still in flight.
enum class TicketState { kQueued, kRunning, kDraining, kDone, kCancelled, kFailed };

class Ticket;

// The smallest goes first: by class, in a class by deadline, then in order of arrival.
struct TransferKey {
  std::int64_t priority = 0;
  Clock::time_point deadline = Clock::time_point::max();
  std::uint64_t arrival = 0;
  auto operator<=>(TransferKey const&) const = default;
};

// How many tickets ended which way.
struct TransferOutcomes {
  std::uint64_t num_done = 0;
  std::uint64_t num_late = 0;  // of those that are done: after their deadline
  std::uint64_t num_cancelled = 0;
  std::uint64_t num_failed = 0;
};

struct TransferQueue {
  using Order = std::map<TransferKey, std::shared_ptr<Ticket>>;

  explicit TransferQueue(std::shared_ptr<Driver> driver_) : driver(std::move(driver_)) {}

  // After every change that the prefetcher's thread has to look at.
  void notify() {
    ++num_changes;
    wake.notify_one();
  }

  std::shared_ptr<Driver> const driver;
  std::mutex mutex;  // guards all that follows, and the tickets' own state
  std::condition_variable wake;
  std::array<Order, kNumDirections> waiting;   // tickets with chunks left that may go
  std::vector<std::shared_ptr<Ticket>> gated;  // those that wait for other work of the device
  std::uint64_t next_arrival = 0;
  std::uint64_t num_changes = 0;
  bool closing = false;
  std::size_t num_stream_waits = 0;  // calls that are handing an event of ours to a stream
  std::condition_variable stream_waits_over;
  std::array<TransferOutcomes, kNumDirections> outcomes;
};

// What a transfer must not lose before its last copy is over.
struct TransferHolds {
  std::shared_ptr<HostImage> image;
  std::unique_ptr<HostImage::Writer> writer;
  std::unique_ptr<Region::Use> region_use;
};

class Ticket {
 public:
  Ticket(std::shared_ptr<TransferQueue> queue, Direction direction, TransferKey key,
         TransferOrder order, Address device, TransferHolds holds, std::shared_ptr<Event> gate);

  [[nodiscard]] TransferOrder const& order() const noexcept { return order_; }
  [[nodiscard]] std::size_t total_bytes() const noexcept { return order_.total_bytes(); }
  // The first so many bytes of the order given have arrived. Takes no lock.
  [[nodiscard]] std::size_t bytes_done() const noexcept { return bytes_done_; }
  [[nodiscard]] TicketState state() const noexcept { return state_; }
  [[nodiscard]] bool finished() const noexcept { return state() >= TicketState::kDone; }
  [[nodiscard]] std::int64_t priority() const;

  // True when the ticket will end as CANCELLED, false when it has ended already.
  bool cancel();
  // For the chunks not yet submitted; false when there are none. A deadline is counted from now.
  bool set_priority(std::int64_t priority);
  bool set_deadline(std::optional<Clock::duration> deadline);

  // Until `bytes` have arrived, or the ticket has ended some other way; false: the time was up.
  bool wait_bytes_until(std::size_t bytes, std::optional<Clock::time_point> deadline);
  bool wait_until(std::optional<Clock::time_point> deadline);
  // Until the copies of the first `bytes` have been handed to the device; otherwise the same.
  bool wait_submitted_until(std::size_t bytes, std::optional<Clock::time_point> deadline);
  // What is put on the stream from now on runs after the copies of the first `bytes`, which have
  // been submitted. Throws like check() when they have not and will not be, and LifecycleError for
  // a stream in capture.
  void wait_on_stream(StreamId stream, std::size_t bytes);
  // Throws what made the ticket fail, TransferCancelled for a cancelled one.
  void check() const;

 private:
  friend class Prefetcher;

  // A chunk that is with the device: what it completes, and the event behind it.
  struct Submitted {
    std::size_t end_bytes = 0;
    EventId event = 0;
  };

  // All private members: the queue's mutex is held.
  [[nodiscard]] TransferQueue::Order& waiting() const {
    return queue_->waiting[static_cast<std::size_t>(direction_)];
  }
  bool set_key(TransferKey key);
  void leave_queue();
  void end(TicketState state);
  template <typename Reached>
  bool wait_changed(std::optional<Clock::time_point> deadline, Reached reached);
  [[noreturn]] void throw_cancelled() const;

  std::shared_ptr<TransferQueue> const queue_;
  Direction const direction_;
  TransferOrder const order_;
  Address const device_;
  std::byte* const host_;
  TransferKey key_;
  Clock::time_point const submitted_at_;
  TransferHolds holds_;
  std::shared_ptr<Event> gate_;  // none: nothing to wait for, or not any more
  TransferOrder::Cursor cursor_;
  std::size_t submitted_bytes_ = 0;  // without those of a failed chunk and after it
  std::size_t chunks_in_flight_ = 0;
  std::deque<Submitted> submitted_;
  bool cancelled_ = false;
  Clock::time_point cancelled_at_{};
  bool ending_ = false;  // too late to cancel
  std::exception_ptr error_;
  std::condition_variable changed_;
  std::atomic<std::size_t> bytes_done_{0};
  std::atomic<TicketState> state_{TicketState::kQueued};
};

}  // namespace aegaeon
