#include "driver/faulty.hpp"

#include <utility>

namespace aegaeon {

void FaultyDriver::fail_call(std::uint64_t n, std::optional<std::string> call, Result code,
                             bool persistent) {
  std::lock_guard lock(mutex_);
  fail_at_ = n;
  fail_name_ = std::move(call);
  fail_code_ = code;
  persistent_ = persistent;
  also_fail_at_ = 0;
  matching_calls_ = 0;
}

void FaultyDriver::also_fail_call(std::uint64_t n, bool persistent) {
  std::lock_guard lock(mutex_);
  also_persistent_ = persistent;
  also_fail_at_ = n;
}

void FaultyDriver::hold(std::string call) {
  std::lock_guard lock(mutex_);
  held_ = std::move(call);
}

void FaultyDriver::release() {
  std::lock_guard lock(mutex_);
  held_.reset();
  released_.notify_all();
}

void FaultyDriver::set_capturing(bool capturing) {
  std::lock_guard lock(mutex_);
  capturing_ = capturing;
}

std::vector<FaultyDriver::Copy> FaultyDriver::copies() const {
  std::lock_guard lock(mutex_);
  return copies_;
}

void FaultyDriver::reset() {
  std::lock_guard lock(mutex_);
  fail_at_ = also_fail_at_ = 0;
  matching_calls_ = 0;
  calls_.clear();
  copies_.clear();
}

std::map<std::string, std::uint64_t> FaultyDriver::calls() const {
  std::lock_guard lock(mutex_);
  return calls_;
}

std::map<std::string, std::int64_t> FaultyDriver::live() const {
  std::lock_guard lock(mutex_);
  return live_;
}

std::map<void const*, FaultyDriver::CallSite> FaultyDriver::call_sites() const {
  std::lock_guard lock(mutex_);
  return call_sites_;
}

template <typename Call>
Result FaultyDriver::pass(char const* name, void const* from, Call call) noexcept {
  {
    std::unique_lock lock(mutex_);
    ++calls_[name];
    auto& site = call_sites_[from];
    site.call = name;
    ++site.num_calls;
    released_.wait(lock, [&] { return !held_ || *held_ != name; });
    if (fail_at_ != 0 && (!fail_name_ || *fail_name_ == name)) {
      ++matching_calls_;
      bool fails = persistent_ ? matching_calls_ >= fail_at_ : matching_calls_ == fail_at_;
      fails = fails || matching_calls_ == also_fail_at_ ||
              (also_fail_at_ != 0 && also_persistent_ && matching_calls_ > also_fail_at_);
      if (fails) {
        ++site.num_failures;
        return fail_code_;
      }
    }
  }
  return call();  // unlocked: a synchronize may wait for what another thread is about to submit
}

void FaultyDriver::count(char const* object, std::int64_t change) {
  std::lock_guard lock(mutex_);
  live_[object] += change;
}

void FaultyDriver::log_copy(char const* call, Address device_address, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  copies_.push_back({call, device_address, bytes});
}

Result FaultyDriver::memory_info(MemoryInfo* info) noexcept {
  return pass("memory_info", __builtin_return_address(0),
              [&] { return inner_->memory_info(info); });
}

Result FaultyDriver::mem_create(MemHandle* handle, std::size_t bytes, bool exportable) noexcept {
  Result result = pass("mem_create", __builtin_return_address(0),
                       [&] { return inner_->mem_create(handle, bytes, exportable); });
  if (result == kSuccess) count("handles", 1);
  return result;
}

Result FaultyDriver::mem_release(MemHandle handle) noexcept {
  Result result =
      pass("mem_release", __builtin_return_address(0), [&] { return inner_->mem_release(handle); });
  if (result == kSuccess) count("handles", -1);
  return result;
}

Result FaultyDriver::address_reserve(Address* address, std::size_t bytes,
                                     std::size_t alignment) noexcept {
  Result result = pass("address_reserve", __builtin_return_address(0),
                       [&] { return inner_->address_reserve(address, bytes, alignment); });
  if (result == kSuccess) count("reservations", 1);
  return result;
}

Result FaultyDriver::address_free(Address address, std::size_t bytes) noexcept {
  Result result = pass("address_free", __builtin_return_address(0),
                       [&] { return inner_->address_free(address, bytes); });
  if (result == kSuccess) count("reservations", -1);
  return result;
}

Result FaultyDriver::mem_map(Address address, std::size_t bytes, std::size_t offset,
                             MemHandle handle) noexcept {
  Result result = pass("mem_map", __builtin_return_address(0),
                       [&] { return inner_->mem_map(address, bytes, offset, handle); });
  if (result == kSuccess) {
    count("mappings", 1);
    std::lock_guard lock(mutex_);
    mapped_.emplace(address, bytes);
  }
  return result;
}

Result FaultyDriver::mem_set_access(Address address, std::size_t bytes, Access access) noexcept {
  return pass("mem_set_access", __builtin_return_address(0),
              [&] { return inner_->mem_set_access(address, bytes, access); });
}

Result FaultyDriver::mem_unmap(Address address, std::size_t bytes) noexcept {
  Result result = pass("mem_unmap", __builtin_return_address(0),
                       [&] { return inner_->mem_unmap(address, bytes); });
  if (result == kSuccess) {
    std::lock_guard lock(mutex_);
    auto begin = mapped_.lower_bound(address);
    auto end = mapped_.lower_bound(address + bytes);
    live_["mappings"] -= std::distance(begin, end);
    mapped_.erase(begin, end);
  }
  return result;
}

Result FaultyDriver::mem_export(int* fd, MemHandle handle) noexcept {
  return pass("mem_export", __builtin_return_address(0),
              [&] { return inner_->mem_export(fd, handle); });
}

Result FaultyDriver::mem_import(MemHandle* handle, int fd, std::size_t bytes) noexcept {
  Result result = pass("mem_import", __builtin_return_address(0),
                       [&] { return inner_->mem_import(handle, fd, bytes); });
  if (result == kSuccess) count("handles", 1);
  return result;
}

Result FaultyDriver::host_alloc(void** memory, std::size_t bytes) noexcept {
  Result result = pass("host_alloc", __builtin_return_address(0),
                       [&] { return inner_->host_alloc(memory, bytes); });
  if (result == kSuccess) count("host_allocations", 1);
  return result;
}

Result FaultyDriver::host_free(void* memory) noexcept {
  Result result =
      pass("host_free", __builtin_return_address(0), [&] { return inner_->host_free(memory); });
  if (result == kSuccess) count("host_allocations", -1);
  return result;
}

Result FaultyDriver::host_alloc_numa(void** memory, std::size_t bytes) noexcept {
  Result result = pass("host_alloc_numa", __builtin_return_address(0),
                       [&] { return inner_->host_alloc_numa(memory, bytes); });
  if (result == kSuccess) count("host_allocations", 1);
  return result;
}

Result FaultyDriver::host_register(void* memory, std::size_t bytes) noexcept {
  Result result = pass("host_register", __builtin_return_address(0),
                       [&] { return inner_->host_register(memory, bytes); });
  if (result == kSuccess) count("registrations", 1);
  return result;
}

Result FaultyDriver::host_unregister(void* memory) noexcept {
  Result result = pass("host_unregister", __builtin_return_address(0),
                       [&] { return inner_->host_unregister(memory); });
  if (result == kSuccess) count("registrations", -1);
  return result;
}

Result FaultyDriver::stream_create(StreamId* stream) noexcept {
  Result result = pass("stream_create", __builtin_return_address(0),
                       [&] { return inner_->stream_create(stream); });
  if (result == kSuccess) count("streams", 1);
  return result;
}

Result FaultyDriver::stream_destroy(StreamId stream) noexcept {
  Result result = pass("stream_destroy", __builtin_return_address(0),
                       [&] { return inner_->stream_destroy(stream); });
  if (result == kSuccess) count("streams", -1);
  return result;
}

Result FaultyDriver::stream_synchronize(StreamId stream) noexcept {
  return pass("stream_synchronize", __builtin_return_address(0),
              [&] { return inner_->stream_synchronize(stream); });
}

Result FaultyDriver::stream_wait_event(StreamId stream, EventId event) noexcept {
  return pass("stream_wait_event", __builtin_return_address(0),
              [&] { return inner_->stream_wait_event(stream, event); });
}

Result FaultyDriver::stream_is_capturing(bool* capturing, StreamId stream) noexcept {
  Result result = pass("stream_is_capturing", __builtin_return_address(0),
                       [&] { return inner_->stream_is_capturing(capturing, stream); });
  std::lock_guard lock(mutex_);
  if (result == kSuccess && capturing_) *capturing = true;
  return result;
}

Result FaultyDriver::memcpy_h2d_async(Address destination, void const* source, std::size_t bytes,
                                      StreamId stream) noexcept {
  log_copy("memcpy_h2d_async", destination, bytes);
  return pass("memcpy_h2d_async", __builtin_return_address(0),
              [&] { return inner_->memcpy_h2d_async(destination, source, bytes, stream); });
}

Result FaultyDriver::memcpy_d2h_async(void* destination, Address source, std::size_t bytes,
                                      StreamId stream) noexcept {
  log_copy("memcpy_d2h_async", source, bytes);
  return pass("memcpy_d2h_async", __builtin_return_address(0),
              [&] { return inner_->memcpy_d2h_async(destination, source, bytes, stream); });
}

Result FaultyDriver::memcpy_d2d_async(Address destination, Address source, std::size_t bytes,
                                      StreamId stream) noexcept {
  return pass("memcpy_d2d_async", __builtin_return_address(0),
              [&] { return inner_->memcpy_d2d_async(destination, source, bytes, stream); });
}

Result FaultyDriver::memset_async(Address destination, std::uint8_t value, std::size_t bytes,
                                  StreamId stream) noexcept {
  return pass("memset_async", __builtin_return_address(0),
              [&] { return inner_->memset_async(destination, value, bytes, stream); });
}

Result FaultyDriver::event_create(EventId* event) noexcept {
  Result result = pass("event_create", __builtin_return_address(0),
                       [&] { return inner_->event_create(event); });
  if (result == kSuccess) count("events", 1);
  return result;
}

Result FaultyDriver::event_destroy(EventId event) noexcept {
  Result result = pass("event_destroy", __builtin_return_address(0),
                       [&] { return inner_->event_destroy(event); });
  if (result == kSuccess) count("events", -1);
  return result;
}

Result FaultyDriver::event_record(EventId event, StreamId stream) noexcept {
  return pass("event_record", __builtin_return_address(0),
              [&] { return inner_->event_record(event, stream); });
}

Result FaultyDriver::event_query(EventId event) noexcept {
  return pass("event_query", __builtin_return_address(0),
              [&] { return inner_->event_query(event); });
}

Result FaultyDriver::event_synchronize(EventId event) noexcept {
  return pass("event_synchronize", __builtin_return_address(0),
              [&] { return inner_->event_synchronize(event); });
}

}  // namespace aegaeon
