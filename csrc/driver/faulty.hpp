// Driver that passes every call to another one, fails or holds up the calls it is told to, and
// counts calls and live objects. For tests.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "driver/driver.hpp"

namespace aegaeon {

class FaultyDriver final : public Driver {
 public:
  explicit FaultyDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

  // From now on the n-th call (counted from 1; of that name, if one is given) returns `code`
  // without reaching the driver; all later matching calls too when persistent.
  void fail_call(std::uint64_t n, std::optional<std::string> call, Result code, bool persistent);
  // And the n-th too, counted like the first one, and all later ones when persistent: for failures
  // on the way back. After fail_call.
  void also_fail_call(std::uint64_t n, bool persistent);
  // Calls of that name wait inside the driver until release().
  void hold(std::string call);
  void release();
  // While set, every stream says that it is being captured into a graph.
  void set_capturing(bool capturing);
  struct Copy {
    std::string call;
    Address device_address;
    std::size_t bytes;
  };
  // Copies between host and device since the last reset(), in order of submission.
  [[nodiscard]] std::vector<Copy> copies() const;
  // No more failures; call counters and copies start again. Live objects are counted on.
  void reset();
  [[nodiscard]] std::map<std::string, std::uint64_t> calls() const;
  [[nodiscard]] std::map<std::string, std::int64_t> live() const;
  // Where calls came from since it was made: by return address, in a build that keeps frames.
  struct CallSite {
    char const* call = "";
    std::uint64_t num_calls = 0;
    std::uint64_t num_failures = 0;  // of those that were told to fail
  };
  [[nodiscard]] std::map<void const*, CallSite> call_sites() const;

  std::string name() const override { return inner_->name(); }
  DeviceKind kind() const noexcept override { return inner_->kind(); }
  int device_index() const noexcept override { return inner_->device_index(); }
  std::size_t granularity_bytes() const noexcept override { return inner_->granularity_bytes(); }
  std::string describe(Result code) const override { return inner_->describe(code); }
  TimeSource& time() noexcept override { return inner_->time(); }

  Result memory_info(MemoryInfo* info) noexcept override;
  Result mem_create(MemHandle* handle, std::size_t bytes, bool exportable) noexcept override;
  Result mem_release(MemHandle handle) noexcept override;
  Result address_reserve(Address* address, std::size_t bytes,
                         std::size_t alignment) noexcept override;
  Result address_free(Address address, std::size_t bytes) noexcept override;
  Result mem_map(Address address, std::size_t bytes, std::size_t offset,
                 MemHandle handle) noexcept override;
  Result mem_set_access(Address address, std::size_t bytes, Access access) noexcept override;
  Result mem_unmap(Address address, std::size_t bytes) noexcept override;
  Result mem_export(int* fd, MemHandle handle) noexcept override;
  Result mem_import(MemHandle* handle, int fd, std::size_t bytes) noexcept override;
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
  template <typename Call>
  Result pass(char const* name, void const* from, Call call) noexcept;
  void count(char const* object, std::int64_t change);
  void log_copy(char const* call, Address device_address, std::size_t bytes);

  std::shared_ptr<Driver> inner_;
  mutable std::mutex mutex_;   // guards all that follows
  std::uint64_t fail_at_ = 0;  // 0: never
  std::uint64_t also_fail_at_ = 0;
  bool also_persistent_ = false;
  std::optional<std::string> fail_name_;
  Result fail_code_ = kInvalidValue;
  bool persistent_ = false;
  std::uint64_t matching_calls_ = 0;
  std::optional<std::string> held_;
  bool capturing_ = false;
  std::condition_variable released_;
  std::vector<Copy> copies_;
  std::map<std::string, std::uint64_t> calls_;
  std::map<std::string, std::int64_t> live_;
  std::map<void const*, CallSite> call_sites_;
  std::map<Address, std::size_t> mapped_;  // an unmap may cover many mappings
};

}  // namespace aegaeon
