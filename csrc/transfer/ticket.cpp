#include "transfer/ticket.hpp"

#include <algorithm>

#include "error.hpp"

namespace aegaeon {

Ticket::Ticket(std::shared_ptr<TransferQueue> queue, Direction direction, TransferKey key,
               TransferOrder order, Address device, TransferHolds holds,
               std::shared_ptr<Event> gate)
    : queue_(std::move(queue)),
      direction_(direction),
      order_(std::move(order)),
      device_(device),
      host_(holds.image->data()),
      key_(key),
      submitted_at_(queue_->driver->time().now()),
      holds_(std::move(holds)),
      gate_(std::move(gate)) {}

std::int64_t Ticket::priority() const {
  std::lock_guard lock(queue_->mutex);
  return key_.priority;
}

bool Ticket::cancel() {
  // Dropped after the lock: the last hold on a region ends it.
  TransferHolds holds;
  std::shared_ptr<Event> gate;
  std::lock_guard lock(queue_->mutex);
  if (finished() || ending_ || cancelled_) return cancelled_;
  cancelled_ = true;
  cancelled_at_ = queue_->driver->time().now();
  leave_queue();
  gate = std::move(gate_);
  if (chunks_in_flight_ > 0) {
    state_ = TicketState::kDraining;
  } else {
    holds = std::move(holds_);
    end(TicketState::kCancelled);
  }
  queue_->notify();
  return true;
}

bool Ticket::set_priority(std::int64_t priority) {
  std::lock_guard lock(queue_->mutex);
  auto key = key_;
  key.priority = priority;
  return set_key(key);
}

bool Ticket::set_deadline(std::optional<Clock::duration> deadline) {
  std::lock_guard lock(queue_->mutex);
  auto key = key_;
  key.deadline = deadline ? queue_->driver->time().now() + *deadline : Clock::time_point::max();
  return set_key(key);
}

bool Ticket::set_key(TransferKey key) {
  if (gate_) {
    key_ = key;
    return true;
  }
  auto node = waiting().extract(key_);
  if (node.empty()) return false;
  key_ = node.key() = key;
  waiting().insert(std::move(node));
  queue_->notify();
  return true;
}

bool Ticket::wait_bytes_until(std::size_t bytes, std::optional<Clock::time_point> deadline) {
  if (bytes_done_ >= bytes) return true;
  return wait_changed(deadline, [&] { return bytes_done_ >= bytes || finished(); });
}

bool Ticket::wait_until(std::optional<Clock::time_point> deadline) {
  return wait_changed(deadline, [&] { return finished(); });
}

bool Ticket::wait_submitted_until(std::size_t bytes, std::optional<Clock::time_point> deadline) {
  if (bytes_done_ >= bytes) return true;
  return wait_changed(deadline, [&] { return submitted_bytes_ >= bytes || finished(); });
}

template <typename Reached>
bool Ticket::wait_changed(std::optional<Clock::time_point> deadline, Reached reached) {
  std::unique_lock lock(queue_->mutex);
  if (deadline) return changed_.wait_until(lock, *deadline, reached);
  changed_.wait(lock, reached);
  return true;
}

void Ticket::wait_on_stream(StreamId stream, std::size_t bytes) {
  auto& driver = *queue_->driver;
  require_no_capture(driver, stream, "order transfers outside of it");
  std::unique_lock lock(queue_->mutex);
  if (bytes_done_ >= bytes) return;
  if (error_) std::rethrow_exception(error_);
  if (cancelled_) throw_cancelled();
  auto found = std::find_if(submitted_.begin(), submitted_.end(),
                            [&](Submitted const& chunk) { return chunk.end_bytes >= bytes; });
  if (found == submitted_.end()) {
    throw LifecycleError(concat("the copies of the first ", bytes, " bytes are not submitted yet"));
  }
  auto event = found->event;
  // Unlocked, the event may be recorded again, behind a later chunk of the same stream: then the
  // wait is for that one, and so for this one too. It is not destroyed while it is counted here.
  ++queue_->num_stream_waits;
  lock.unlock();
  Result result = driver.stream_wait_event(stream, event);
  lock.lock();
  if (--queue_->num_stream_waits == 0) queue_->stream_waits_over.notify_all();
  lock.unlock();
  aegaeon::check(driver, result, "stream_wait_event");
}

void Ticket::check() const {
  std::lock_guard lock(queue_->mutex);
  if (error_) std::rethrow_exception(error_);
  if (state() == TicketState::kCancelled) throw_cancelled();
}

void Ticket::throw_cancelled() const {
  throw TransferCancelled(concat("the transfer was cancelled after ", bytes_done_.load(), " of ",
                                 total_bytes(), " bytes"));
}

void Ticket::leave_queue() {
  waiting().erase(key_);
  std::erase_if(queue_->gated, [&](auto const& ticket) { return ticket.get() == this; });
}

void Ticket::end(TicketState state) {
  auto& outcomes = queue_->outcomes[static_cast<std::size_t>(direction_)];
  if (state == TicketState::kDone) {
    ++outcomes.num_done;
    if (queue_->driver->time().now() > key_.deadline) ++outcomes.num_late;
  } else {
    ++(state == TicketState::kFailed ? outcomes.num_failed : outcomes.num_cancelled);
  }
  submitted_.clear();
  state_ = state;
  changed_.notify_all();
}

}  // namespace aegaeon
