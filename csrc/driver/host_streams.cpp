#include "driver/host_streams.hpp"

#include <pthread.h>

#include <cstring>
#include <utility>

#include "driver/host_copy.hpp"

namespace aegaeon {

std::uint64_t HostEvent::begin_record() {
  std::lock_guard lock(mutex_);
  return ++recorded_;
}

void HostEvent::complete(std::uint64_t record) {
  std::lock_guard lock(mutex_);
  if (record > completed_) completed_ = record;
  changed_.notify_all();
}

std::uint64_t HostEvent::last_record() const {
  std::lock_guard lock(mutex_);
  return recorded_;
}

bool HostEvent::reached(std::uint64_t record) const {
  std::lock_guard lock(mutex_);
  return completed_ >= record;
}

void HostEvent::wait(std::uint64_t record) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return completed_ >= record; });
}

HostStream::HostStream() : worker_([this] { run(); }) {
  pthread_setname_np(worker_.native_handle(), "aegaeon-stream");
}

HostStream::~HostStream() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    wake_.notify_one();
  }
  worker_.join();
}

void HostStream::copy(void* destination, void const* source, std::size_t bytes) {
  push({.kind = Kind::kCopy,
        .destination = destination,
        .source = source,
        .bytes = bytes,
        .event = {}});
}

void HostStream::fill(void* destination, std::uint8_t value, std::size_t bytes) {
  push({.kind = Kind::kFill,
        .destination = destination,
        .bytes = bytes,
        .value = value,
        .event = {}});
}

void HostStream::record(std::shared_ptr<HostEvent> event) {
  auto number = event->begin_record();
  push({.kind = Kind::kRecord, .event = std::move(event), .record = number});
}

void HostStream::wait(std::shared_ptr<HostEvent> event) {
  auto number = event->last_record();
  push({.kind = Kind::kWait, .event = std::move(event), .record = number});
}

void HostStream::synchronize() {
  std::unique_lock lock(mutex_);
  auto target = pushed_;
  drained_.wait(lock, [&] { return finished_ >= target; });
}

void HostStream::push(Operation operation) {
  std::lock_guard lock(mutex_);
  queue_.push_back(std::move(operation));
  ++pushed_;
  if (idle_) {
    idle_ = false;  // one wake-up, however many operations follow before the worker runs
    wake_.notify_one();
  }
}

void HostStream::run() {
  std::deque<Operation> batch;
  std::unique_lock lock(mutex_);
  for (;;) {
    while (queue_.empty() && !stopping_) {
      idle_ = true;
      wake_.wait(lock);
    }
    idle_ = false;
    if (queue_.empty()) return;
    batch.swap(queue_);
    lock.unlock();
    for (auto& operation : batch) {
      switch (operation.kind) {
        case Kind::kCopy:
          copy_bytes(operation.destination, operation.source, operation.bytes);
          break;
        case Kind::kFill:
          std::memset(operation.destination, operation.value, operation.bytes);
          break;
        case Kind::kRecord:
          operation.event->complete(operation.record);
          break;
        case Kind::kWait:
          operation.event->wait(operation.record);
          break;
      }
    }
    lock.lock();
    finished_ += batch.size();
    batch.clear();
    drained_.notify_all();
  }
}

}  // namespace aegaeon
