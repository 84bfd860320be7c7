#include "transfer/ticket.hpp"

#include <algorithm>
#include <numeric>

#include "error.hpp"

namespace aegaeon {
namespace {

std::size_t sum_bytes(std::vector<Piece> const& pieces) {
  return std::accumulate(
      pieces.begin(), pieces.end(), std::size_t{0},
      [](std::size_t sum, Piece const& piece) { return sum + piece.size_bytes; });
}

}  // namespace

Ticket::Ticket(std::shared_ptr<TransferQueue> queue, Direction direction, std::int64_t priority,
               std::vector<Piece> pieces, Address device, TransferHolds holds)
    : queue_(std::move(queue)),
      direction_(direction),
      priority_(priority),
      pieces_(std::move(pieces)),
      device_(device),
      host_(holds.image->data()),
      total_bytes_(sum_bytes(pieces_)),
      submitted_at_(Clock::now()),
      holds_(std::move(holds)) {}

bool Ticket::cancel() {
  TransferHolds released;  // dropped unlocked, after the lock: the last hold on a region ends it
  std::lock_guard lock(queue_->mutex);
  if (finished() || ending_) return cancelled_;
  cancelled_ = true;
  queue_->waiting[static_cast<std::size_t>(direction_)].erase({priority_, arrival_});
  if (chunks_in_flight_ > 0) {
    state_ = TicketState::kDraining;
    return true;
  }
  released = std::move(holds_);
  end(TicketState::kCancelled);
  return true;
}

bool Ticket::wait_bytes_until(std::size_t bytes, std::optional<Clock::time_point> deadline) {
  if (bytes_done_ >= bytes) return true;
  std::unique_lock lock(queue_->mutex);
  auto reached = [&] { return bytes_done_ >= bytes || finished(); };
  if (!deadline) {
    changed_.wait(lock, reached);
    return true;
  }
  return changed_.wait_until(lock, *deadline, reached);
}

bool Ticket::wait_until(std::optional<Clock::time_point> deadline) {
  std::unique_lock lock(queue_->mutex);
  auto reached = [&] { return finished(); };
  if (!deadline) {
    changed_.wait(lock, reached);
    return true;
  }
  return changed_.wait_until(lock, *deadline, reached);
}

void Ticket::check() const {
  std::lock_guard lock(queue_->mutex);
  if (error_) std::rethrow_exception(error_);
  if (state() == TicketState::kCancelled) {
    throw TransferCancelled(concat("the transfer was cancelled after ", bytes_done_.load(), " of ",
                                   total_bytes_, " bytes"));
  }
}

// A chunk is a batch of consecutive pieces, so that many small pieces cost one event and one
// hand-over between threads; pieces that touch on both sides become one
// copy.
std::vector<Piece> Ticket::next_chunk(std::size_t chunk_bytes) {
  std::vector<Piece> chunk;
  std::size_t room = chunk_bytes;
  while (room > 0 && !all_submitted()) {
    auto const& piece = pieces_[next_piece_];
    auto in_region = piece.region_offset_bytes + next_offset_;
    auto in_image = piece.image_offset_bytes + next_offset_;
    auto bytes = std::min(room, piece.size_bytes - next_offset_);
    auto* last = chunk.empty() ? nullptr : &chunk.back();
    if (last != nullptr && last->region_offset_bytes + last->size_bytes == in_region &&
        last->image_offset_bytes + last->size_bytes == in_image) {
      last->size_bytes += bytes;
    } else {
      chunk.push_back({in_region, in_image, bytes});
    }
    room -= bytes;
    next_offset_ += bytes;
    if (next_offset_ == piece.size_bytes) {
      ++next_piece_;
      next_offset_ = 0;
    }
  }
  return chunk;
}

void Ticket::end(TicketState state) {
  state_ = state;
  changed_.notify_all();
}

}  // namespace aegaeon
