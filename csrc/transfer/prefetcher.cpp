#include "transfer/prefetcher.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "error.hpp"

namespace aegaeon {
namespace {

double seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

std::size_t index_of(Direction direction) {
  return static_cast<std::size_t>(direction);
}

bool inside(std::size_t offset_bytes, std::size_t size_bytes, std::size_t limit) {
  return offset_bytes < limit && size_bytes <= limit - offset_bytes;
}

// Throws unless the pieces are inside both and do not overlap on the side that is written.
void check_pieces(std::vector<Piece> const& pieces, Direction direction, std::size_t image_bytes,
                  std::size_t region_bytes) {
  if (pieces.empty()) throw std::invalid_argument("order is empty");
  std::vector<Range> written;
  for (auto const& piece : pieces) {
    if (piece.size_bytes == 0 || !inside(piece.image_offset_bytes, piece.size_bytes, image_bytes) ||
        !inside(piece.region_offset_bytes, piece.size_bytes, region_bytes)) {
      throw std::invalid_argument(
          concat("piece of ", piece.size_bytes, " bytes, at ", piece.region_offset_bytes,
                 " of the region and ", piece.image_offset_bytes,
                 " of the image, is empty or outside the image of ", image_bytes,
                 " bytes and the region of ", region_bytes, " bytes"));
    }
    written.push_back(
        {direction == Direction::kLoad ? piece.region_offset_bytes : piece.image_offset_bytes,
         piece.size_bytes});
  }
  std::sort(written.begin(), written.end(),
            [](Range const& a, Range const& b) { return a.offset_bytes < b.offset_bytes; });
  for (std::size_t i = 1; i < written.size(); ++i) {
    if (written[i - 1].offset_bytes + written[i - 1].size_bytes > written[i].offset_bytes) {
      throw std::invalid_argument(concat("pieces at ", written[i - 1].offset_bytes, " and ",
                                         written[i].offset_bytes, " overlap"));
    }
  }
}

std::vector<Range> in_region(std::vector<Piece> const& pieces) {
  std::vector<Range> ranges;
  ranges.reserve(pieces.size());
  for (auto const& piece : pieces) ranges.push_back({piece.region_offset_bytes, piece.size_bytes});
  return ranges;
}

}  // namespace

Prefetcher::Prefetcher(std::shared_ptr<Driver> driver, std::size_t chunk_bytes, std::size_t depth)
    : driver_(std::move(driver)),
      chunk_bytes_(chunk_bytes),
      depth_(depth),
      queue_(std::make_shared<TransferQueue>()),
      process_(getpid()) {
  if (chunk_bytes == 0 || depth == 0) {
    throw std::invalid_argument(
        concat("chunk_bytes=", chunk_bytes, " and depth=", depth, " have to be positive"));
  }
  for (auto& lane : lanes_) {
    lane.stream = std::make_unique<Stream>(driver_);
    for (std::size_t i = 0; i < depth; ++i) lane.events.push_back(std::make_unique<Event>(driver_));
  }
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "aegaeon-prefetch");
}

Prefetcher::~Prefetcher() {
  if (getpid() != process_) {
    // A child of fork() has no thread to join, and destroying what that thread waits on would
    // never return. The copy is left to the end of the process.
    static_cast<void>(new auto(std::move(thread_)));
    static_cast<void>(new auto(queue_));
    static_cast<void>(new auto(std::move(lanes_)));
    return;
  }
  try {
    close();
  } catch (std::exception const& error) {
    std::fprintf(stderr, "aegaeon_kernels: closing a prefetcher: %s\n", error.what());
    // A copy nobody can wait for may still run: what it touches is never given back.
    for (auto& lane : lanes_) static_cast<void>(new auto(std::move(lane.limbo)));
  }
}

void Prefetcher::require_open() const {
  if (queue_->closing) throw LifecycleError("the prefetcher is closed");
}

std::shared_ptr<Ticket> Prefetcher::submit(Direction direction, std::shared_ptr<HostImage> image,
                                           std::shared_ptr<Region> region, std::int64_t priority,
                                           std::optional<std::vector<Piece>> order) {
  if (region->arena()->driver() != driver_) {
    throw std::invalid_argument(concat("the region is on another device (",
                                       region->arena()->driver()->name(),
                                       ") than the prefetcher's (", driver_->name(), ")"));
  }
  auto pieces = std::move(order).value_or(std::vector<Piece>{{0, 0, image->size_bytes()}});
  check_pieces(pieces, direction, image->size_bytes(), region->size_bytes());
  TransferHolds holds;
  if (direction == Direction::kStore) holds.writer = image->write();
  holds.region_use = region->use(in_region(pieces));
  holds.image = std::move(image);
  auto ticket = std::make_shared<Ticket>(queue_, direction, priority, std::move(pieces),
                                         region->address(), std::move(holds));
  std::lock_guard lock(queue_->mutex);
  require_open();
  ticket->arrival_ = queue_->next_arrival++;
  queue_->waiting[index_of(direction)].emplace(std::pair{priority, ticket->arrival_}, ticket);
  queue_->wake.notify_one();
  return ticket;
}

DirectionStats Prefetcher::stats(Direction direction) const {
  std::lock_guard lock(queue_->mutex);
  auto const& lane = lanes_[index_of(direction)];
  auto stats = lane.stats;
  if (!lane.in_flight.empty()) stats.busy_s += seconds(Clock::now() - lane.busy_since);
  return stats;
}

void Prefetcher::close() {
  std::lock_guard closing(close_mutex_);
  std::vector<std::shared_ptr<Ticket>> queued;
  {
    std::lock_guard lock(queue_->mutex);
    queue_->closing = true;
    for (auto const& waiting : queue_->waiting) {
      for (auto const& [order, ticket] : waiting) queued.push_back(ticket);
    }
  }
  for (auto const& ticket : queued) ticket->cancel();
  queue_->wake.notify_one();
  if (thread_.joinable()) thread_.join();
  Result first = kSuccess;
  char const* call = "";
  auto attempt = [&](Result result, char const* name) {
    if (result == kSuccess || first != kSuccess) return;
    first = result;
    call = name;
  };
  for (auto& lane : lanes_) {
    if (!lane.limbo.empty()) {
      Result result = driver_->stream_synchronize(lane.stream->id());
      attempt(result, "stream_synchronize");
      if (result != kSuccess) continue;
      lane.limbo.clear();
    }
    for (auto const& event : lane.events) attempt(event->destroy(), "event_destroy");
    attempt(lane.stream->destroy(), "stream_destroy");
  }
  check(*driver_, first, call);
}

void Prefetcher::run() {
  Lock lock(queue_->mutex);
  for (;;) {
    for (auto direction : {Direction::kLoad, Direction::kStore}) {
      while (submit_chunk(lock, direction)) {
      }
    }
    if (auto* lane = oldest_in_flight()) {
      reap(lock, *lane);
      continue;
    }
    bool confirmed = retry_limbo(lock);
    if (!queue_->waiting[0].empty() || !queue_->waiting[1].empty()) continue;
    if (queue_->closing) return;
    if (confirmed) {
      queue_->wake.wait(lock);
    } else {
      // The driver is failing; whether a copy is over can only be asked again.
      queue_->wake.wait_for(lock, std::chrono::milliseconds(50));
    }
  }
}

// Submits the next chunk of the most urgent ticket, if there is one and a place in flight.
bool Prefetcher::submit_chunk(Lock& lock, Direction direction) {
  auto& lane = lanes_[index_of(direction)];
  auto& waiting = queue_->waiting[index_of(direction)];
  if (waiting.empty() || lane.in_flight.size() >= depth_) return false;
  auto ticket = waiting.begin()->second;
  auto pieces = ticket->next_chunk(chunk_bytes_);
  if (ticket->all_submitted()) waiting.erase(waiting.begin());
  auto now = Clock::now();
  if (ticket->state_ == TicketState::kQueued) {
    ticket->state_ = TicketState::kRunning;
    auto waited = seconds(now - ticket->submitted_at_);
    auto& wait = lane.stats.queue_waits[ticket->priority_];
    ++wait.num_transfers;
    wait.total_s += waited;
    wait.max_s = std::max(wait.max_s, waited);
  }
  if (lane.in_flight.empty()) lane.busy_since = now;
  ++ticket->chunks_in_flight_;
  Chunk chunk{.ticket = ticket, .event_idx = {}, .sequence = next_sequence_++};
  auto event_idx = lane.next_event++ % depth_;

  lock.unlock();  // others may submit and cancel meanwhile
  auto stream = lane.stream->id();
  std::size_t num_copies = 0;
  for (auto const& piece : pieces) {
    auto* host = ticket->host_ + piece.image_offset_bytes;
    auto device = ticket->device_ + piece.region_offset_bytes;
    if (direction == Direction::kLoad) {
      chunk.call = "memcpy_h2d_async";
      chunk.result = driver_->memcpy_h2d_async(device, host, piece.size_bytes, stream);
    } else {
      chunk.call = "memcpy_d2h_async";
      chunk.result = driver_->memcpy_d2h_async(host, device, piece.size_bytes, stream);
    }
    if (chunk.result != kSuccess) break;
    ++num_copies;
    chunk.bytes += piece.size_bytes;
  }
  // Also after a failure: the pieces before it are under way and have to be waited for.
  Result recorded = driver_->event_record(lane.events[event_idx]->id(), stream);
  if (recorded == kSuccess) {
    chunk.event_idx = event_idx;
  } else if (chunk.result == kSuccess) {
    chunk.call = "event_record";
    chunk.result = recorded;
  }
  lock.lock();
  lane.stats.num_copies += num_copies;
  lane.in_flight.push_back(std::move(chunk));
  return true;
}

Prefetcher::Lane* Prefetcher::oldest_in_flight() {
  Lane* oldest = nullptr;
  for (auto& lane : lanes_) {
    if (lane.in_flight.empty()) continue;
    if (oldest == nullptr || lane.in_flight.front().sequence < oldest->in_flight.front().sequence) {
      oldest = &lane;
    }
  }
  return oldest;
}

// Waits until the oldest chunk's copies are over, whatever became of them.
void Prefetcher::reap(Lock& lock, Lane& lane) {
  auto& chunk = lane.in_flight.front();  // only this thread takes from the deque
  lock.unlock();
  Result drained = kSuccess;
  if (chunk.event_idx) {
    drained = driver_->event_synchronize(lane.events[*chunk.event_idx]->id());
    if (drained != kSuccess && chunk.result == kSuccess) {
      chunk.result = drained;
      chunk.call = "event_synchronize";
    }
  }
  if (!chunk.event_idx || drained != kSuccess) {
    // The event cannot tell whether the copies are over; the stream may.
    drained = driver_->stream_synchronize(lane.stream->id());
  }
  std::exception_ptr error;
  if (chunk.result != kSuccess) {
    try {
      check(*driver_, chunk.result, chunk.call, chunk.bytes);
    } catch (...) {
      error = std::current_exception();
    }
  }
  lock.lock();
  auto ticket = std::move(chunk.ticket);
  lane.stats.num_chunks += 1;
  if (error) {
    fail(*ticket, error);
  } else {
    lane.stats.bytes += chunk.bytes;
    // After a failed chunk the later ones are not what bytes_done promises, a prefix.
    if (!ticket->error_) {
      ticket->bytes_done_ += chunk.bytes;
      ticket->changed_.notify_all();
    }
  }
  lane.in_flight.pop_front();
  if (lane.in_flight.empty()) lane.stats.busy_s += seconds(Clock::now() - lane.busy_since);
  --ticket->chunks_in_flight_;
  bool over = ticket->all_submitted() || ticket->cancelled_ || ticket->error_;
  if (ticket->chunks_in_flight_ == 0 && over) {
    finish(lock, *ticket, drained == kSuccess ? nullptr : &lane);
  }
}

void Prefetcher::fail(Ticket& ticket, std::exception_ptr error) {
  if (!ticket.error_) ticket.error_ = std::move(error);
  ticket.state_ = TicketState::kDraining;
  queue_->waiting[index_of(ticket.direction_)].erase({ticket.priority_, ticket.arrival_});
}

void Prefetcher::finish(Lock& lock, Ticket& ticket, Lane* limbo) {
  ticket.ending_ = true;
  auto state = ticket.error_       ? TicketState::kFailed
               : ticket.cancelled_ ? TicketState::kCancelled
                                   : TicketState::kDone;
  auto holds = std::move(ticket.holds_);
  if (limbo != nullptr) {
    limbo->limbo.push_back(std::move(holds));
  } else {
    // Before the end shows: who sees it may unmap at once. Unlocked: the last hold ends a region.
    lock.unlock();
    {
      auto released = std::move(holds);
    }
    lock.lock();
  }
  ticket.end(state);
}

// False while the driver cannot tell whether the copies of failed transfers are over.
bool Prefetcher::retry_limbo(Lock& lock) {
  bool confirmed = true;
  for (auto& lane : lanes_) {
    if (lane.limbo.empty()) continue;
    lock.unlock();
    Result result = driver_->stream_synchronize(lane.stream->id());
    std::vector<TransferHolds> released;
    lock.lock();
    if (result != kSuccess) {
      confirmed = false;
      continue;
    }
    released.swap(lane.limbo);
    lock.unlock();
    released.clear();
    lock.lock();
  }
  return confirmed;
}

}  // namespace aegaeon
