// Driver whose streams, copy engines and clock are simulated; memory is another driver's. For
// tests: times are exact, and work is done as late as the rules allow, so that who forgets to wait
// for it sees that it is not.
//
// The engines: one for each direction between host and device, first come first served, a copy at a
// time. The end of everything on a stream is known when it is submitted; the clock moves only when
// somebody waits (then to the end of what is waited for), polls, or says so. Bytes move only when
// somebody has waited for them, or for what comes after them, by synchronising or by a query that
// said yes: from the source as it is then, whatever the clock says.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver/driver.hpp"

namespace aegaeon {

inline constexpr Result kIllegalAddress = 700;

struct SimulatedLink {
  double bytes_per_s = 55.6e9;                // in each direction
  std::chrono::nanoseconds copy_overhead{0};  // what a copy takes beside its bytes
  std::chrono::nanoseconds wake_latency{0};   // until somebody who waited notices
};

struct SimulatedCopy {
  char const* call = "";
  Address device_address = 0;
  std::size_t bytes = 0;
  Clock::time_point submitted;
  Clock::time_point begin;  // on the engine
  Clock::time_point end;
};

class SimulatedDriver final : public Driver, public TimeSource {
 public:
  // Throws DriverError.
  SimulatedDriver(std::shared_ptr<Driver> memory, SimulatedLink link);
  ~SimulatedDriver() override;

  // The clock starts at zero. advance() completes what is over by then; the others' waits do not
  // move the clock beyond `limit` while it is held, but wait for its release, or for a later limit.
  void advance(Clock::duration duration);
  void hold_clock(Clock::time_point limit);
  void release_clock() { hold_clock(Clock::time_point::max()); }
  // Until somebody waits for a time beyond the limit, where the clock then is; false when nobody
  // has come within a minute.
  [[nodiscard]] bool await_held();
  // The stream is busy for so long, as with a kernel.
  Result compute(StreamId stream, std::chrono::nanoseconds duration) noexcept;
  // Between host and device, since the start, in order of submission.
  [[nodiscard]] std::vector<SimulatedCopy> copies() const;

  Clock::time_point now() noexcept override;
  void wait(std::unique_lock<std::mutex>& lock, std::condition_variable& condition,
            Clock::time_point until) override;

  std::string name() const override { return "simulated"; }
  DeviceKind kind() const noexcept override { return memory_->kind(); }
  int device_index() const noexcept override { return memory_->device_index(); }
  std::size_t granularity_bytes() const noexcept override { return memory_->granularity_bytes(); }
  std::string describe(Result code) const override;
  TimeSource& time() noexcept override { return *this; }

  Result memory_info(MemoryInfo* info) noexcept override { return memory_->memory_info(info); }
  Result mem_create(MemHandle* handle, std::size_t bytes, bool exportable) noexcept override {
    return memory_->mem_create(handle, bytes, exportable);
  }
  Result mem_release(MemHandle handle) noexcept override { return memory_->mem_release(handle); }
  Result address_reserve(Address* address, std::size_t bytes,
                         std::size_t alignment) noexcept override {
    return memory_->address_reserve(address, bytes, alignment);
  }
  Result address_free(Address address, std::size_t bytes) noexcept override {
    return memory_->address_free(address, bytes);
  }
  Result mem_map(Address address, std::size_t bytes, std::size_t offset,
                 MemHandle handle) noexcept override {
    return memory_->mem_map(address, bytes, offset, handle);
  }
  Result mem_set_access(Address address, std::size_t bytes, Access access) noexcept override;
  Result mem_unmap(Address address, std::size_t bytes) noexcept override;
  Result mem_export(int* fd, MemHandle handle) noexcept override {
    return memory_->mem_export(fd, handle);
  }
  Result mem_import(MemHandle* handle, int fd, std::size_t bytes) noexcept override {
    return memory_->mem_import(handle, fd, bytes);
  }

  Result host_alloc(void** memory, std::size_t bytes) noexcept override;
  Result host_free(void* memory) noexcept override;
  Result host_alloc_numa(void** memory, std::size_t bytes) noexcept override;
  Result host_register(void* memory, std::size_t bytes) noexcept override;
  Result host_unregister(void* memory) noexcept override;

  Result stream_create(StreamId* stream) noexcept override;
  Result stream_destroy(StreamId stream) noexcept override;
  Result stream_synchronize(StreamId stream) noexcept override;
  Result stream_wait_event(StreamId stream, EventId event) noexcept override;
  Result stream_is_capturing(bool* capturing, StreamId stream) noexcept override;
  Result memcpy_h2d_async(Address destination, void const* source, std::size_t bytes,
                          StreamId stream) noexcept override;
  Result memcpy_d2h_async(void* destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override;
  Result memcpy_d2d_async(Address destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override;
  Result memset_async(Address destination, std::uint8_t value, std::size_t bytes,
                      StreamId stream) noexcept override;
  Result event_create(EventId* event) noexcept override;
  Result event_destroy(EventId event) noexcept override;
  Result event_record(EventId event, StreamId stream) noexcept override;
  Result event_query(EventId event) noexcept override;
  Result event_synchronize(EventId event) noexcept override;

 private:
  using OperationId = std::uint64_t;  // in order of submission; 0: none
  using Lock = std::unique_lock<std::mutex>;

  enum class Kind { kCopyIn, kCopyOut, kCopyWithin, kFill, kOther };
  struct Operation {
    Kind kind = Kind::kOther;
    Address device = 0;
    Address other = 0;  // host, or device too
    std::size_t bytes = 0;
    std::uint8_t value = 0;
    std::vector<OperationId> after{};  // what comes before it on its stream, or by an event
    Clock::time_point end{};
    bool lost = false;  // its host memory is gone
  };
  // The last operation on a stream, or before an event.
  struct Mark {
    OperationId last = 0;
    Clock::time_point end{};
  };
  struct Engine {
    Clock::time_point free{};
  };

  // All private members: the mutex is held.
  Result push(StreamId stream, Operation operation, std::chrono::nanoseconds duration,
              Engine* engine, char const* call);
  std::chrono::nanoseconds copy_time(std::size_t bytes) const;
  void pass_time_until(Lock& lock, Clock::time_point target);
  Result settle(OperationId last);
  Result perform(std::set<OperationId> const& operations);
  Result perform(Operation const& operation);
  void lose(std::map<Address, std::size_t>& memories, void* memory);

  std::shared_ptr<Driver> const memory_;
  SimulatedLink const link_;
  StreamId worker_ = 0;  // of memory_: moves the bytes
  mutable std::mutex mutex_;
  Clock::time_point now_{};
  Clock::time_point limit_ = Clock::time_point::max();
  std::multiset<Clock::time_point> targets_;  // what the waiting threads wait for
  std::condition_variable limit_changed_;
  std::condition_variable targets_changed_;
  Engine engine_in_;
  Engine engine_out_;
  std::uint64_t next_id_ = 1;
  std::unordered_map<StreamId, Mark> streams_;
  std::unordered_map<EventId, Mark> events_;
  std::map<OperationId, Operation> pending_;
  std::map<Address, std::size_t> host_memory_;
  std::map<Address, std::size_t> registered_;
  std::vector<SimulatedCopy> copies_;
  Result fault_ = kSuccess;  // after a copy to memory that was gone: of every later call
};

}  // namespace aegaeon
