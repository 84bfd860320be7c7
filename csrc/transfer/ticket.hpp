// Ticket: one transfer of a prefetcher, as its user sees it. TransferQueue: what the prefetcher's
// thread, its tickets and those who submit share.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "transfer/host_image.hpp"
#include "vmm/arena.hpp"

namespace aegaeon {

using Clock = std::chrono::steady_clock;

enum class Direction { kLoad, kStore };  // host to device, device to host
inline constexpr std::size_t kNumDirections = 2;

// DRAINING: cancelled or failed, with chunks still in flight.
enum class TicketState { kQueued, kRunning, kDraining, kDone, kCancelled, kFailed };

class Ticket;

// One run of bytes of a transfer: where it lies in the region and where in the image.
struct Piece {
  std::size_t region_offset_bytes = 0;
  std::size_t image_offset_bytes = 0;
  std::size_t size_bytes = 0;
};

struct TransferQueue {
  // Smaller priority values go first, equal ones in order of arrival.
  using Order = std::map<std::pair<std::int64_t, std::uint64_t>, std::shared_ptr<Ticket>>;

  std::mutex mutex;  // guards all that follows, and the tickets' own state
  std::condition_variable wake;
  std::array<Order, kNumDirections> waiting;  // tickets with chunks left to submit
  std::uint64_t next_arrival = 0;
  bool closing = false;
};

// What a transfer must not lose before its last copy is over.
struct TransferHolds {
  std::shared_ptr<HostImage> image;
  std::unique_ptr<HostImage::Writer> writer;
  std::unique_ptr<Region::Use> region_use;
};

class Ticket {
 public:
  Ticket(std::shared_ptr<TransferQueue> queue, Direction direction, std::int64_t priority,
         std::vector<Piece> pieces, Address device, TransferHolds holds);

  [[nodiscard]] std::size_t total_bytes() const noexcept { return total_bytes_; }
  // The first so many bytes of the order given have arrived. Takes no lock.
  [[nodiscard]] std::size_t bytes_done() const noexcept { return bytes_done_; }
  [[nodiscard]] TicketState state() const noexcept { return state_; }
  [[nodiscard]] bool finished() const noexcept { return state() >= TicketState::kDone; }

  // True when the ticket will end as CANCELLED, false when it has ended already.
  bool cancel();
  // Until `bytes` have arrived, or the ticket has ended some other way; false: the time was up.
  bool wait_bytes_until(std::size_t bytes, std::optional<Clock::time_point> deadline);
  bool wait_until(std::optional<Clock::time_point> deadline);
  // Throws what made the ticket fail, TransferCancelled for a cancelled one.
  void check() const;

 private:
  friend class Prefetcher;

  // All private members: the queue's mutex is held.
  [[nodiscard]] bool all_submitted() const noexcept { return next_piece_ == pieces_.size(); }
  std::vector<Piece> next_chunk(std::size_t chunk_bytes);
  void end(TicketState state);

  std::shared_ptr<TransferQueue> const queue_;
  Direction const direction_;
  std::int64_t const priority_;
  std::uint64_t arrival_ = 0;
  std::vector<Piece> const pieces_;
  Address const device_;
  std::byte* const host_;
  std::size_t const total_bytes_;
  Clock::time_point const submitted_at_;
  TransferHolds holds_;
  std::size_t next_piece_ = 0;
  std::size_t next_offset_ = 0;  // in that piece
  std::size_t chunks_in_flight_ = 0;
  bool cancelled_ = false;
  bool ending_ = false;  // too late to cancel
  std::exception_ptr error_;
  std::condition_variable changed_;
  std::atomic<std::size_t> bytes_done_{0};
  std::atomic<TicketState> state_{TicketState::kQueued};
};

}  // namespace aegaeon
