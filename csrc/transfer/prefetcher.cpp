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

// How soon a gate is looked at again: by an eighth of the time waited already, within these.
constexpr Clock::duration kShortestPoll = std::chrono::microseconds(20);
constexpr Clock::duration kLongestPoll = std::chrono::microseconds(500);
// The driver is failing: whether a copy is over can only be asked again.
constexpr Clock::duration kLimboPoll = std::chrono::milliseconds(50);

void check_rate(std::optional<double> max_bytes_per_s) {
  if (max_bytes_per_s && !(*max_bytes_per_s >= 1 && *max_bytes_per_s < 1e18)) {
    throw std::invalid_argument(concat("a rate of ", *max_bytes_per_s,
                                       " bytes per second: give at least 1, or none for no limit"));
  }
}

void check_chunk_bytes(std::size_t chunk_bytes) {
  if (chunk_bytes == 0) throw std::invalid_argument("chunk_bytes=0 has to be positive");
}

// One copy must not touch two pieces of pinned memory.
std::vector<Piece> within_pinned_pieces(std::vector<Piece> const& copies, HostImage const& image) {
  std::vector<Piece> result;
  for (auto rest : copies) {
    while (rest.size_bytes > 0) {
      auto size = std::min(rest.size_bytes, image.copyable_bytes(rest.image_offset_bytes));
      result.push_back({rest.region_offset_bytes, rest.image_offset_bytes, size});
      rest = {rest.region_offset_bytes + size, rest.image_offset_bytes + size,
              rest.size_bytes - size};
    }
  }
  return result;
}

}  // namespace

Prefetcher::Prefetcher(std::shared_ptr<Driver> driver, PrefetcherOptions const& options)
    : driver_(std::move(driver)),
      time_(driver_->time()),
      depth_(options.depth),
      cap_exempt_priority_(options.cap_exempt_priority),
      queue_(std::make_shared<TransferQueue>(driver_)),
      chunk_bytes_(options.chunk_bytes),
      process_(getpid()) {
  check_chunk_bytes(options.chunk_bytes);
  if (depth_ == 0) throw std::invalid_argument("depth=0 has to be positive");
  check_rate(options.max_bytes_per_s);
  for (auto& lane : lanes_) {
    lane.stream = std::make_unique<Stream>(driver_);
    for (std::size_t i = 0; i < depth_; ++i) {
      lane.events.push_back(std::make_unique<Event>(driver_));
    }
    lane.limit.set_rate(options.max_bytes_per_s, time_.now());
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
                                           std::shared_ptr<Region> region,
                                           TransferOptions options) {
  if (region->arena()->driver() != driver_) {
    throw std::invalid_argument(concat("the region is on another device (",
                                       region->arena()->driver()->name(),
                                       ") than the prefetcher's (", driver_->name(), ")"));
  }
  TransferOrder order(
      direction, std::move(options.order).value_or(std::vector<Piece>{{0, 0, image->size_bytes()}}),
      std::move(options.layer_ends), image->size_bytes(), region->size_bytes());
  TransferHolds holds;
  if (direction == Direction::kStore) holds.writer = image->write();
  holds.region_use = region->use(order.in_region(), direction == Direction::kLoad);
  holds.image = std::move(image);
  std::shared_ptr<Event> gate;
  if (options.after) {
    require_no_capture(*driver_, *options.after, "order transfers outside of it");
    gate = std::make_shared<Event>(driver_);
    check(*driver_, driver_->event_record(gate->id(), *options.after), "event_record");
  }
  TransferKey key{.priority = options.priority};
  if (options.deadline) key.deadline = time_.now() + *options.deadline;
  auto ticket = std::make_shared<Ticket>(queue_, direction, key, std::move(order),
                                         region->address(), std::move(holds), std::move(gate));
  std::lock_guard lock(queue_->mutex);
  require_open();
  ticket->key_.arrival = queue_->next_arrival++;
  if (ticket->gate_) {
    queue_->gated.push_back(ticket);
  } else {
    ticket->waiting().emplace(ticket->key_, ticket);
  }
  queue_->notify();
  return ticket;
}

void Prefetcher::set_rate(Direction direction, std::optional<double> max_bytes_per_s) {
  check_rate(max_bytes_per_s);
  std::lock_guard lock(queue_->mutex);
  lanes_[index_of(direction)].limit.set_rate(max_bytes_per_s, time_.now());
  queue_->notify();
}

void Prefetcher::set_chunk_bytes(std::size_t chunk_bytes) {
  check_chunk_bytes(chunk_bytes);
  std::lock_guard lock(queue_->mutex);
  chunk_bytes_ = chunk_bytes;
}

DirectionStats Prefetcher::stats(Direction direction) const {
  std::lock_guard lock(queue_->mutex);
  auto const& lane = lanes_[index_of(direction)];
  auto stats = lane.stats;
  auto now = time_.now();
  if (!lane.in_flight.empty()) stats.busy_s += seconds(now - lane.busy_since);
  if (lane.throttled_since) stats.throttled_s += seconds(now - *lane.throttled_since);
  stats.outcomes = queue_->outcomes[index_of(direction)];
  return stats;
}

void Prefetcher::close() {
  std::lock_guard closing(close_mutex_);
  std::vector<std::shared_ptr<Ticket>> queued;
  {
    std::lock_guard lock(queue_->mutex);
    queue_->closing = true;
    for (auto const& waiting : queue_->waiting) {
      for (auto const& [key, ticket] : waiting) queued.push_back(ticket);
    }
    queued.insert(queued.end(), queue_->gated.begin(), queue_->gated.end());
    queue_->notify();
  }
  for (auto const& ticket : queued) ticket->cancel();
  if (thread_.joinable()) thread_.join();
  {
    Lock lock(queue_->mutex);
    queue_->stream_waits_over.wait(lock, [&] { return queue_->num_stream_waits == 0; });
  }
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
    auto seen = queue_->num_changes;
    auto wake_at = Clock::time_point::max();
    open_gates(lock, wake_at);
    for (auto direction : {Direction::kLoad, Direction::kStore}) {
      while (submit_chunk(lock, direction, wake_at)) {
      }
    }
    if (auto* lane = next_to_finish()) {
      reap(lock, *lane);
      continue;
    }
    if (!retry_limbo(lock)) wake_at = std::min(wake_at, time_.now() + kLimboPoll);
    if (queue_->num_changes != seen) continue;  // while it was unlocked
    if (queue_->closing) return;
    time_.wait(lock, queue_->wake, wake_at);
  }
}

// Lets those transfers go whose gates the device has passed. The host asks, instead of making the
// copy stream wait: behind a copy that waits for somebody's kernels everything else would wait too.
void Prefetcher::open_gates(Lock& lock, Clock::time_point& wake_at) {
  if (queue_->gated.empty()) return;
  struct Poll {
    std::shared_ptr<Ticket> ticket;
    std::shared_ptr<Event> gate;
    Result result = kSuccess;
  };
  std::vector<Poll> polls;
  for (auto const& ticket : queue_->gated) polls.push_back({ticket, ticket->gate_});
  lock.unlock();
  for (auto& poll : polls) poll.result = driver_->event_query(poll.gate->id());
  lock.lock();
  auto now = time_.now();
  for (auto& [ticket, gate, result] : polls) {
    if (!ticket->gate_) continue;  // cancelled meanwhile
    if (result == kNotReady) {
      auto pause = std::clamp((now - ticket->submitted_at_) / 8, kShortestPoll, kLongestPoll);
      wake_at = std::min(wake_at, now + pause);
      continue;
    }
    ticket->leave_queue();
    ticket->gate_.reset();
    if (result == kSuccess) {
      ticket->waiting().emplace(ticket->key_, ticket);
    } else {
      fail(*ticket, error_of(result, "event_query", 0));
      finish(lock, *ticket, nullptr);
    }
  }
  lock.unlock();
  polls.clear();  // the events go
  lock.lock();
}

// Submits the next chunk of the most urgent ticket, if there is one and a place in flight.
bool Prefetcher::submit_chunk(Lock& lock, Direction direction, Clock::time_point& wake_at) {
  auto& lane = lanes_[index_of(direction)];
  auto& waiting = queue_->waiting[index_of(direction)];
  auto now = time_.now();
  if (waiting.empty()) end_throttling(lane, now);
  if (waiting.empty() || lane.in_flight.size() >= depth_) return false;
  auto ticket = waiting.begin()->second;
  if (!exempt(*ticket) && lane.limit.limited() && now < lane.limit.next()) {
    // The more urgent a ticket, the rather it is exempt: those behind it are held back as well.
    if (!lane.throttled_since) lane.throttled_since = now;
    wake_at = std::min(wake_at, lane.limit.next());
    return false;
  }
  end_throttling(lane, now);
  auto begin_bytes = ticket->cursor_.total_bytes;
  auto copies = within_pinned_pieces(ticket->order_.take(ticket->cursor_, chunk_bytes_),
                                     *ticket->holds_.image);
  auto end_bytes = ticket->cursor_.total_bytes;
  if (ticket->order_.at_end(ticket->cursor_)) waiting.erase(waiting.begin());
  if (ticket->state_ == TicketState::kQueued) {
    ticket->state_ = TicketState::kRunning;
    lane.stats.queue_waits[ticket->key_.priority].add(now - ticket->submitted_at_);
  }
  if (!exempt(*ticket)) lane.limit.take(end_bytes - begin_bytes, now);
  if (lane.in_flight.empty()) lane.busy_since = lane.front_since = now;
  ++ticket->chunks_in_flight_;
  Chunk chunk{.ticket = ticket, .event_idx = {}};
  auto event_idx = lane.next_event++ % depth_;

  lock.unlock();  // others may submit and cancel meanwhile
  auto stream = lane.stream->id();
  std::size_t num_copies = 0;
  for (auto const& copy : copies) {
    auto* host = ticket->host_ + copy.image_offset_bytes;
    auto device = ticket->device_ + copy.region_offset_bytes;
    if (direction == Direction::kLoad) {
      chunk.call = "memcpy_h2d_async";
      chunk.result = driver_->memcpy_h2d_async(device, host, copy.size_bytes, stream);
    } else {
      chunk.call = "memcpy_d2h_async";
      chunk.result = driver_->memcpy_d2h_async(host, device, copy.size_bytes, stream);
    }
    if (chunk.result != kSuccess) break;
    ++num_copies;
    chunk.bytes += copy.size_bytes;
  }
  // Also after a failure: the copies before it are under way and have to be waited for.
  Result recorded = driver_->event_record(lane.events[event_idx]->id(), stream);
  if (recorded == kSuccess) {
    chunk.event_idx = event_idx;
  } else if (chunk.result == kSuccess) {
    chunk.call = "event_record";
    chunk.result = recorded;
  }
  lock.lock();
  if (chunk.result == kSuccess && ticket->submitted_bytes_ + chunk.bytes == end_bytes) {
    ticket->submitted_bytes_ = end_bytes;
    ticket->submitted_.push_back({end_bytes, lane.events[event_idx]->id()});
    ticket->changed_.notify_all();
  }
  lane.stats.num_copies += num_copies;
  lane.in_flight.push_back(std::move(chunk));
  return true;
}

bool Prefetcher::exempt(Ticket const& ticket) const {
  return cap_exempt_priority_ && ticket.key_.priority <= *cap_exempt_priority_;
}

void Prefetcher::end_throttling(Lane& lane, Clock::time_point now) {
  if (!lane.throttled_since) return;
  lane.stats.throttled_s += seconds(now - *lane.throttled_since);
  lane.throttled_since.reset();
}

// One event can be waited for at a time: that of the chunk which should be over first, going by
// what the link has done of late. Waiting for the other direction's would leave this engine idle.
Prefetcher::Lane* Prefetcher::next_to_finish() {
  Lane* next = nullptr;
  Clock::time_point earliest;
  for (auto& lane : lanes_) {
    if (lane.in_flight.empty()) continue;
    auto time = static_cast<double>(lane.in_flight.front().bytes) * recent_s_ / recent_bytes_;
    auto end = lane.front_since +
               std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(time));
    if (next != nullptr && end >= earliest) continue;
    next = &lane;
    earliest = end;
  }
  return next;
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
  if (chunk.result != kSuccess) error = error_of(chunk.result, chunk.call, chunk.bytes);
  lock.lock();
  auto ticket = std::move(chunk.ticket);
  auto now = time_.now();
  lane.stats.num_chunks += 1;
  if (error) {
    fail(*ticket, error);
  } else {
    lane.stats.bytes += chunk.bytes;
    recent_bytes_ = 0.9 * recent_bytes_ + static_cast<double>(chunk.bytes);
    recent_s_ = 0.9 * recent_s_ + seconds(now - lane.front_since);
    // After a failed chunk the later ones are not what bytes_done promises, a prefix.
    if (!ticket->error_) {
      ticket->bytes_done_ += chunk.bytes;
      ticket->submitted_.pop_front();
      ticket->changed_.notify_all();
    }
  }
  lane.in_flight.pop_front();
  lane.front_since = now;
  if (lane.in_flight.empty()) lane.stats.busy_s += seconds(now - lane.busy_since);
  --ticket->chunks_in_flight_;
  bool over = ticket->order_.at_end(ticket->cursor_) || ticket->cancelled_ || ticket->error_;
  if (ticket->chunks_in_flight_ == 0 && over) {
    finish(lock, *ticket, drained == kSuccess ? nullptr : &lane);
  }
  if (drained != kSuccess) fail_queued(lock, error);
}

void Prefetcher::fail(Ticket& ticket, std::exception_ptr error) {
  if (!ticket.error_) ticket.error_ = std::move(error);
  ticket.state_ = TicketState::kDraining;
  ticket.leave_queue();
}

// The device does not answer any more, as after a kernel's illegal access: every later call would
// fail too, one by one and perhaps much later. Nobody is left waiting for that.
void Prefetcher::fail_queued(Lock& lock, std::exception_ptr const& error) {
  std::vector<std::shared_ptr<Ticket>> queued = queue_->gated;
  for (auto const& waiting : queue_->waiting) {
    for (auto const& [key, ticket] : waiting) queued.push_back(ticket);
  }
  for (auto const& ticket : queued) {
    if (ticket->finished() || ticket->ending_) continue;
    fail(*ticket, error);
    if (ticket->chunks_in_flight_ == 0) finish(lock, *ticket, nullptr);
  }
}

void Prefetcher::finish(Lock& lock, Ticket& ticket, Lane* limbo) {
  ticket.ending_ = true;
  auto state = ticket.error_       ? TicketState::kFailed
               : ticket.cancelled_ ? TicketState::kCancelled
                                   : TicketState::kDone;
  if (ticket.cancelled_) {
    lanes_[index_of(ticket.direction_)].stats.cancel_latencies.add(time_.now() -
                                                                   ticket.cancelled_at_);
  }
  auto holds = std::move(ticket.holds_);
  auto gate = std::move(ticket.gate_);
  if (limbo != nullptr) {
    limbo->limbo.push_back(std::move(holds));
  } else {
    // Before the end shows: who sees it may unmap at once. Unlocked: the last hold ends a region.
    lock.unlock();
    {
      auto released = std::move(holds);
      gate.reset();
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

std::exception_ptr Prefetcher::error_of(Result result, char const* call, std::size_t bytes) const {
  try {
    check(*driver_, result, call, bytes);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

}  // namespace aegaeon
