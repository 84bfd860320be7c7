// Driver: the few device driver calls this project needs, as an interface. The concepts and the
// result codes are CUDA's, whichever implementation is behind: libcuda.cpp, host.cpp, faulty.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "driver/clock.hpp"

namespace aegaeon {

using Result = int;  // a CUresult value
using Address = std::uint64_t;
using MemHandle = std::uint64_t;
using StreamId = std::uint64_t;
using EventId = std::uint64_t;

inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kDriverOutOfMemory = 2;
inline constexpr Result kNotInitialized = 3;
inline constexpr Result kNoDevice = 100;
inline constexpr Result kInvalidHandle = 400;
inline constexpr Result kNotReady = 600;
inline constexpr Result kHostMemoryAlreadyRegistered = 712;
inline constexpr Result kHostMemoryNotRegistered = 713;
inline constexpr Result kNotSupported = 801;

enum class Access { kNone, kRead, kReadWrite };
enum class DeviceKind { kHost, kCuda };

struct MemoryInfo {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
};

// Calls may come from any thread. Those that return Result never throw; the others never fail.
class Driver {
 public:
  Driver() = default;
  virtual ~Driver() = default;
  Driver(Driver const&) = delete;  // owns a device context
  Driver& operator=(Driver const&) = delete;

  [[nodiscard]] virtual std::string name() const = 0;  // "host", "cuda:0"
  [[nodiscard]] virtual DeviceKind kind() const noexcept = 0;
  [[nodiscard]] virtual int device_index() const noexcept = 0;
  [[nodiscard]] virtual std::size_t granularity_bytes() const noexcept = 0;
  [[nodiscard]] virtual std::string describe(Result code) const = 0;
  // The time that its streams run by.
  [[nodiscard]] virtual TimeSource& time() noexcept { return steady_time(); }

  virtual Result memory_info(MemoryInfo* info) noexcept = 0;

  // Virtual memory. The rules, cuda.h's: a handle is mapped whole, at offset 0; a mapping has no
  // access until mem_set_access; set_access and unmap take runs of whole mappings; address_free
  // takes exactly one reservation, with nothing mapped in it.
  // exportable: other processes may share it, by mem_export.
  virtual Result mem_create(MemHandle* handle, std::size_t bytes, bool exportable) noexcept = 0;
  virtual Result mem_release(MemHandle handle) noexcept = 0;
  virtual Result address_reserve(Address* address, std::size_t bytes,
                                 std::size_t alignment) noexcept = 0;
  virtual Result address_free(Address address, std::size_t bytes) noexcept = 0;
  virtual Result mem_map(Address address, std::size_t bytes, std::size_t offset,
                         MemHandle handle) noexcept = 0;
  virtual Result mem_set_access(Address address, std::size_t bytes, Access access) noexcept = 0;
  virtual Result mem_unmap(Address address, std::size_t bytes) noexcept = 0;

  // A new descriptor of an exportable handle (close-on-exec); the caller closes it.
  virtual Result mem_export(int* fd, MemHandle handle) noexcept = 0;
  // A handle of its own for memory of that size that another process exported, which counts as the
  // memory of that process; the descriptor stays the caller's. Released like any other handle, and
  // not exported again.
  virtual Result mem_import(MemHandle* handle, int fd, std::size_t bytes) noexcept = 0;

  // Host memory the device can read and write by DMA, page-locked where that means something.
  virtual Result host_alloc(void** memory, std::size_t bytes) noexcept = 0;
  virtual Result host_free(void* memory) noexcept = 0;
  // The same near the device, by the virtual memory calls; kNotSupported where the driver cannot.
  // Freed by host_free.
  virtual Result host_alloc_numa(void** memory, std::size_t bytes) noexcept = 0;
  // Page-locks memory that exists, from a page boundary on, for all contexts of the process. No
  // part of it may be registered already. The host driver only keeps the books.
  virtual Result host_register(void* memory, std::size_t bytes) noexcept = 0;
  virtual Result host_unregister(void* memory) noexcept = 0;

  virtual Result stream_create(StreamId* stream) noexcept = 0;
  virtual Result stream_destroy(StreamId stream) noexcept = 0;
  virtual Result stream_synchronize(StreamId stream) noexcept = 0;
  virtual Result stream_wait_event(StreamId stream, EventId event) noexcept = 0;
  // Whether the stream is being captured into a graph: then we may neither wait for it nor record.
  virtual Result stream_is_capturing(bool* capturing, StreamId stream) noexcept = 0;

  virtual Result memcpy_h2d_async(Address destination, void const* source, std::size_t bytes,
                                  StreamId stream) noexcept = 0;
  virtual Result memcpy_d2h_async(void* destination, Address source, std::size_t bytes,
                                  StreamId stream) noexcept = 0;
  virtual Result memcpy_d2d_async(Address destination, Address source, std::size_t bytes,
                                  StreamId stream) noexcept = 0;
  virtual Result memset_async(Address destination, std::uint8_t value, std::size_t bytes,
                              StreamId stream) noexcept = 0;

  virtual Result event_create(EventId* event) noexcept = 0;
  virtual Result event_destroy(EventId event) noexcept = 0;
  virtual Result event_record(EventId event, StreamId stream) noexcept = 0;
  virtual Result event_query(EventId event) noexcept = 0;  // kNotReady while work is pending
  virtual Result event_synchronize(EventId event) noexcept = 0;
};

inline constexpr std::size_t kHostGranularity = std::size_t{2} << 20;
// The embedded default: a device of capacity_bytes in this process's own memory. Page tables move
// with the memory where the kernel can do that; move_page_tables = false is for tests of the rest.
std::shared_ptr<Driver> make_host_driver(std::size_t capacity_bytes, bool move_page_tables);
// With granules of that many bytes, a multiple of a page: for tests that look at every byte.
std::shared_ptr<Driver> make_host_driver(std::size_t capacity_bytes, bool move_page_tables,
                                         std::size_t granularity_bytes);

// CUDA device `index` through the driver library (opened here, never linked). Throws DriverError,
// with what to do about it, when the library, the device or a needed call is missing.
std::shared_ptr<Driver> make_cuda_driver(int index, std::string const& library);
// How many devices that library reports; 0 when there is none, for whatever reason.
int count_cuda_devices(std::string const& library) noexcept;

}  // namespace aegaeon
