#include "driver/simulated.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "error.hpp"

namespace aegaeon {
namespace {

// What asking costs: who polls gets there.
constexpr std::chrono::microseconds kQueryTime{1};

Address address_of(void const* memory) {
  return reinterpret_cast<Address>(memory);
}

}  // namespace

SimulatedDriver::SimulatedDriver(std::shared_ptr<Driver> memory, SimulatedLink link)
    : memory_(std::move(memory)), link_(link) {
  check(*memory_, memory_->stream_create(&worker_), "stream_create");
}

SimulatedDriver::~SimulatedDriver() {
  report(memory_->stream_destroy(worker_), "stream_destroy");
}

std::string SimulatedDriver::describe(Result code) const {
  return code == kIllegalAddress ? "a copy met memory that was gone" : memory_->describe(code);
}

void SimulatedDriver::advance(Clock::duration duration) {
  Lock lock(mutex_);
  now_ += duration;
  std::set<OperationId> over;
  for (auto const& [id, operation] : pending_) {
    if (operation.end <= now_) over.insert(id);
  }
  static_cast<void>(perform(over));
  limit_changed_.notify_all();
}

void SimulatedDriver::hold_clock(Clock::time_point limit) {
  Lock lock(mutex_);
  limit_ = limit;
  limit_changed_.notify_all();
}

bool SimulatedDriver::await_held() {
  Lock lock(mutex_);
  bool held = targets_changed_.wait_for(lock, std::chrono::minutes(1), [&] {
    return !targets_.empty() && *targets_.rbegin() > limit_;
  });
  if (held) now_ = std::max(now_, limit_);
  return held;
}

std::vector<SimulatedCopy> SimulatedDriver::copies() const {
  Lock lock(mutex_);
  return copies_;
}

Clock::time_point SimulatedDriver::now() noexcept {
  Lock lock(mutex_);
  return now_;
}

void SimulatedDriver::wait(std::unique_lock<std::mutex>& lock, std::condition_variable& condition,
                           Clock::time_point until) {
  if (until == Clock::time_point::max()) {
    condition.wait(lock);
    return;
  }
  auto reached = [&] {
    Lock own(mutex_);
    if (until <= limit_) now_ = std::max(now_, until);
    return now_ >= until;
  };
  if (reached()) {
    condition.wait_for(lock, std::chrono::seconds(0));  // lets others have the lock
    return;
  }
  std::multiset<Clock::time_point>::iterator target;
  {
    Lock own(mutex_);
    target = targets_.insert(until);
    targets_changed_.notify_all();
  }
  // Of the notification the caller's lock tells, of the limit ours: so this one is asked for.
  while (condition.wait_for(lock, std::chrono::milliseconds(1)) == std::cv_status::timeout &&
         !reached()) {
  }
  Lock own(mutex_);
  targets_.erase(target);
}

void SimulatedDriver::pass_time_until(Lock& lock, Clock::time_point target) {
  auto waiting = targets_.insert(target);
  targets_changed_.notify_all();
  limit_changed_.wait(lock, [&] { return target <= limit_ || target <= now_; });
  targets_.erase(waiting);
  now_ = std::max(now_, target);
}

Result SimulatedDriver::mem_set_access(Address address, std::size_t bytes, Access access) noexcept {
  Lock lock(mutex_);  // no bytes move meanwhile
  return memory_->mem_set_access(address, bytes, access);
}

Result SimulatedDriver::mem_unmap(Address address, std::size_t bytes) noexcept {
  Lock lock(mutex_);
  return memory_->mem_unmap(address, bytes);
}

Result SimulatedDriver::host_alloc(void** memory, std::size_t bytes) noexcept {
  Lock lock(mutex_);
  Result result = memory_->host_alloc(memory, bytes);
  if (result == kSuccess) host_memory_.emplace(address_of(*memory), bytes);
  return result;
}

Result SimulatedDriver::host_alloc_numa(void** memory, std::size_t bytes) noexcept {
  Lock lock(mutex_);
  Result result = memory_->host_alloc_numa(memory, bytes);
  if (result == kSuccess) host_memory_.emplace(address_of(*memory), bytes);
  return result;
}

Result SimulatedDriver::host_free(void* memory) noexcept {
  Lock lock(mutex_);
  lose(host_memory_, memory);
  return memory_->host_free(memory);
}

Result SimulatedDriver::host_register(void* memory, std::size_t bytes) noexcept {
  Lock lock(mutex_);
  Result result = memory_->host_register(memory, bytes);
  if (result == kSuccess) registered_.emplace(address_of(memory), bytes);
  return result;
}

Result SimulatedDriver::host_unregister(void* memory) noexcept {
  Lock lock(mutex_);
  lose(registered_, memory);
  return memory_->host_unregister(memory);
}

void SimulatedDriver::lose(std::map<Address, std::size_t>& memories, void* memory) {
  auto found = memories.find(address_of(memory));
  if (found == memories.end()) return;
  auto [begin, bytes] = *found;
  for (auto& [id, operation] : pending_) {
    bool of_host = operation.kind == Kind::kCopyIn || operation.kind == Kind::kCopyOut;
    bool apart = operation.other + operation.bytes <= begin || begin + bytes <= operation.other;
    if (of_host && !apart) operation.lost = true;
  }
  memories.erase(found);
}

Result SimulatedDriver::stream_create(StreamId* stream) noexcept {
  Lock lock(mutex_);
  *stream = next_id_++;
  streams_.emplace(*stream, Mark{});
  return kSuccess;
}

Result SimulatedDriver::stream_destroy(StreamId stream) noexcept {
  Lock lock(mutex_);  // as with CUDA, what is on it goes on
  return streams_.erase(stream) == 1 ? kSuccess : kInvalidHandle;
}

Result SimulatedDriver::stream_synchronize(StreamId stream) noexcept {
  Lock lock(mutex_);
  if (fault_ != kSuccess) return fault_;
  auto found = streams_.find(stream);
  if (found == streams_.end()) return kInvalidHandle;
  auto mark = found->second;
  pass_time_until(lock, mark.end > now_ ? mark.end + link_.wake_latency : now_);
  return settle(mark.last);
}

Result SimulatedDriver::stream_wait_event(StreamId stream, EventId event) noexcept {
  Lock lock(mutex_);
  auto found = events_.find(event);
  if (found == events_.end()) return kInvalidHandle;
  auto awaited = found->second;
  Operation operation;
  if (awaited.last != 0) operation.after.push_back(awaited.last);
  operation.end = awaited.end;
  return push(stream, std::move(operation), {}, nullptr, "");
}

Result SimulatedDriver::stream_is_capturing(bool* capturing, StreamId stream) noexcept {
  Lock lock(mutex_);
  *capturing = false;
  return streams_.contains(stream) ? kSuccess : kInvalidHandle;
}

Result SimulatedDriver::memcpy_h2d_async(Address destination, void const* source, std::size_t bytes,
                                         StreamId stream) noexcept {
  Lock lock(mutex_);
  Operation copy{
      .kind = Kind::kCopyIn, .device = destination, .other = address_of(source), .bytes = bytes};
  return push(stream, std::move(copy), copy_time(bytes), &engine_in_, "memcpy_h2d_async");
}

Result SimulatedDriver::memcpy_d2h_async(void* destination, Address source, std::size_t bytes,
                                         StreamId stream) noexcept {
  Lock lock(mutex_);
  Operation copy{
      .kind = Kind::kCopyOut, .device = source, .other = address_of(destination), .bytes = bytes};
  return push(stream, std::move(copy), copy_time(bytes), &engine_out_, "memcpy_d2h_async");
}

Result SimulatedDriver::memcpy_d2d_async(Address destination, Address source, std::size_t bytes,
                                         StreamId stream) noexcept {
  Lock lock(mutex_);
  Operation copy{.kind = Kind::kCopyWithin, .device = destination, .other = source, .bytes = bytes};
  return push(stream, std::move(copy), {}, nullptr, "");
}

Result SimulatedDriver::memset_async(Address destination, std::uint8_t value, std::size_t bytes,
                                     StreamId stream) noexcept {
  Lock lock(mutex_);
  Operation fill{.kind = Kind::kFill, .device = destination, .bytes = bytes, .value = value};
  return push(stream, std::move(fill), {}, nullptr, "");
}

Result SimulatedDriver::compute(StreamId stream, std::chrono::nanoseconds duration) noexcept {
  Lock lock(mutex_);
  return push(stream, {}, duration, nullptr, "");
}

Result SimulatedDriver::event_create(EventId* event) noexcept {
  Lock lock(mutex_);
  *event = next_id_++;
  events_.emplace(*event, Mark{});
  return kSuccess;
}

Result SimulatedDriver::event_destroy(EventId event) noexcept {
  Lock lock(mutex_);
  return events_.erase(event) == 1 ? kSuccess : kInvalidHandle;
}

Result SimulatedDriver::event_record(EventId event, StreamId stream) noexcept {
  Lock lock(mutex_);
  if (fault_ != kSuccess) return fault_;
  auto recorded = events_.find(event);
  auto found = streams_.find(stream);
  if (recorded == events_.end() || found == streams_.end()) return kInvalidHandle;
  recorded->second = found->second;
  return kSuccess;
}

Result SimulatedDriver::event_query(EventId event) noexcept {
  Lock lock(mutex_);
  if (fault_ != kSuccess) return fault_;
  auto found = events_.find(event);
  if (found == events_.end()) return kInvalidHandle;
  auto mark = found->second;
  if (mark.end > now_) {
    now_ = std::max(now_, std::min(now_ + kQueryTime, limit_));
    return kNotReady;
  }
  return settle(mark.last);
}

Result SimulatedDriver::event_synchronize(EventId event) noexcept {
  Lock lock(mutex_);
  if (fault_ != kSuccess) return fault_;
  auto found = events_.find(event);
  if (found == events_.end()) return kInvalidHandle;
  auto mark = found->second;
  pass_time_until(lock, mark.end > now_ ? mark.end + link_.wake_latency : now_);
  return settle(mark.last);
}

std::chrono::nanoseconds SimulatedDriver::copy_time(std::size_t bytes) const {
  auto ns = static_cast<double>(bytes) / link_.bytes_per_s * 1e9;
  return link_.copy_overhead + std::chrono::nanoseconds(std::llround(ns));
}

// operation.end: not before that.
Result SimulatedDriver::push(StreamId stream, Operation operation,
                             std::chrono::nanoseconds duration, Engine* engine, char const* call) {
  if (fault_ != kSuccess) return fault_;
  auto found = streams_.find(stream);
  if (found == streams_.end()) return kInvalidHandle;
  auto& mark = found->second;
  auto begin = std::max({now_, mark.end, operation.end});
  if (engine != nullptr) {
    begin = std::max(begin, engine->free);
    engine->free = begin + duration;
    copies_.push_back({call, operation.device, operation.bytes, now_, begin, begin + duration});
  }
  operation.end = begin + duration;
  if (mark.last != 0) operation.after.push_back(mark.last);
  mark = {next_id_++, operation.end};
  pending_.emplace_hint(pending_.end(), mark.last, std::move(operation));
  return kSuccess;
}

// Moves the bytes of the operation and of all that come before it.
Result SimulatedDriver::settle(OperationId last) {
  std::set<OperationId> needed;
  std::vector<OperationId> unseen{last};
  while (!unseen.empty()) {
    auto id = unseen.back();
    unseen.pop_back();
    auto found = pending_.find(id);
    if (found == pending_.end() || !needed.insert(id).second) continue;
    unseen.insert(unseen.end(), found->second.after.begin(), found->second.after.end());
  }
  return perform(needed);
}

Result SimulatedDriver::perform(std::set<OperationId> const& operations) {
  for (auto id : operations) {
    auto found = pending_.find(id);
    if (found->second.lost || perform(found->second) != kSuccess) fault_ = kIllegalAddress;
    pending_.erase(found);
  }
  if (!operations.empty()) report(memory_->stream_synchronize(worker_), "stream_synchronize");
  return fault_;
}

Result SimulatedDriver::perform(Operation const& operation) {
  switch (operation.kind) {
    case Kind::kCopyIn:
      return memory_->memcpy_h2d_async(operation.device,
                                       reinterpret_cast<void const*>(operation.other),
                                       operation.bytes, worker_);
    case Kind::kCopyOut:
      return memory_->memcpy_d2h_async(reinterpret_cast<void*>(operation.other), operation.device,
                                       operation.bytes, worker_);
    case Kind::kCopyWithin:
      return memory_->memcpy_d2d_async(operation.device, operation.other, operation.bytes, worker_);
    case Kind::kFill:
      return memory_->memset_async(operation.device, operation.value, operation.bytes, worker_);
    case Kind::kOther:
      break;
  }
  return kSuccess;
}

}  // namespace aegaeon
