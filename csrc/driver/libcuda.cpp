// The driver interface over libcuda.so.1, opened at run time: the module imports, and everything
// else in it works, on a machine without a GPU. The only file that names cu* symbols.
#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "driver/driver.hpp"
#include "error.hpp"

namespace aegaeon {
namespace {

// clang-format off
#define AEGAEON_CUDA_FUNCTIONS(use)                                                         \
  use(cuInit) use(cuGetErrorString) use(cuDeviceGetCount) use(cuDeviceGet)                  \
  use(cuDeviceGetAttribute) use(cuDevicePrimaryCtxRetain) use(cuDevicePrimaryCtxRelease)    \
  use(cuCtxGetCurrent) use(cuCtxPushCurrent) use(cuCtxPopCurrent)                           \
  use(cuMemGetInfo) use(cuMemGetAllocationGranularity) use(cuMemCreate) use(cuMemRelease)   \
  use(cuMemAddressReserve) use(cuMemAddressFree) use(cuMemMap) use(cuMemSetAccess)          \
  use(cuMemUnmap) use(cuMemHostAlloc) use(cuMemFreeHost)                                    \
  use(cuStreamCreate) use(cuStreamDestroy) use(cuStreamSynchronize) use(cuStreamWaitEvent)  \
  use(cuMemcpyHtoDAsync) use(cuMemcpyDtoHAsync) use(cuMemcpyDtoDAsync) use(cuMemsetD8Async) \
  use(cuEventCreate) use(cuEventDestroy) use(cuEventRecord) use(cuEventQuery)               \
  use(cuEventSynchronize)
// Without one of these, the calls that need it are kNotSupported, and the rest works.
#define AEGAEON_OPTIONAL_CUDA_FUNCTIONS(use)                                                \
  use(cuMemExportToShareableHandle) use(cuMemImportFromShareableHandle)                     \
  use(cuMemHostRegister) use(cuMemHostUnregister)                                           \
  use(cuStreamIsCapturing) use(cuThreadExchangeStreamCaptureMode)
// clang-format on

// Values that cuda.h does not name in all of its versions, for use in what it does name.
constexpr auto kHostNumaLocation = static_cast<CUmemLocationType>(3);
constexpr auto kHostNumaId = static_cast<CUdevice_attribute>(134);
constexpr auto kHostNumaVmmSupported = static_cast<CUdevice_attribute>(141);

// Some kernels cap a single pin at 2 GB, and a large one holds locks that others wait for.
constexpr std::size_t kRegistrationBytes = std::size_t{1} << 30;

constexpr char const* kAdvice =
    "install the NVIDIA driver (in a container: start it with GPU access), or use Device(\"host\")";

// The functions of one driver library. It is never closed once it works: the driver keeps threads
// and exit handlers of its own.
struct Cuda {
  explicit Cuda(std::string const& library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      char const* reason = dlerror();
      throw DriverError(concat("no CUDA driver: cannot open ", library, " (",
                               reason != nullptr ? reason : "no reason given", "); ", kAdvice),
                        "dlopen", kNotInitialized, 0);
    }
    auto resolve = [&](auto& function, char const* symbol, bool optional) {
      void* found = dlsym(handle, symbol);
      if (found == nullptr && !optional) {
        dlclose(handle);
        throw DriverError(concat("the CUDA driver ", library, " has no ", symbol,
                                 ": it is too old for virtual memory management; update it"),
                          "dlsym", kNotSupported, 0);
      }
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
    };
    // cuda.h renames what has versions (cuMemGetInfo to cuMemGetInfo_v2). The extra step expands
    // the name before it becomes a string, so the symbol is the one whose type was declared.
#define AEGAEON_TEXT(symbol) #symbol
#define AEGAEON_RESOLVE(symbol) resolve(symbol, AEGAEON_TEXT(symbol), false);
#define AEGAEON_RESOLVE_OPTIONAL(symbol) resolve(symbol, AEGAEON_TEXT(symbol), true);
    AEGAEON_CUDA_FUNCTIONS(AEGAEON_RESOLVE)
    AEGAEON_OPTIONAL_CUDA_FUNCTIONS(AEGAEON_RESOLVE_OPTIONAL)
#undef AEGAEON_RESOLVE_OPTIONAL
#undef AEGAEON_RESOLVE
#undef AEGAEON_TEXT
  }

#define AEGAEON_DECLARE(symbol) decltype(&::symbol) symbol = nullptr;
  AEGAEON_CUDA_FUNCTIONS(AEGAEON_DECLARE)
  AEGAEON_OPTIONAL_CUDA_FUNCTIONS(AEGAEON_DECLARE)
#undef AEGAEON_DECLARE

  [[nodiscard]] std::string describe(Result code) const {
    char const* text = nullptr;
    bool known = cuGetErrorString(static_cast<CUresult>(code), &text) == CUDA_SUCCESS;
    return known && text != nullptr ? text : "unknown driver error";
  }

  void require(Result result, char const* call, std::string const& what) const {
    if (result == kSuccess) return;
    throw DriverError(concat(what, ": ", describe(result), " (code ", result, "); ", kAdvice), call,
                      result, 0);
  }
};

// The device's primary context, which torch and every other user of the runtime API shares.
class CudaDriver final : public Driver {
 public:
  CudaDriver(int index, std::string const& library) : cuda_(library), index_(index) {
    cuda_.require(cuda_.cuInit(0), "cuInit", "the CUDA driver does not start");
    int count = 0;
    cuda_.require(cuda_.cuDeviceGetCount(&count), "cuDeviceGetCount", "cannot count CUDA devices");
    if (index >= count) {
      throw DriverError(concat("no device cuda:", index, ": the driver reports ", count,
                               " device(s); check CUDA_VISIBLE_DEVICES"),
                        "cuDeviceGet", kNoDevice, 0);
    }
    cuda_.require(cuda_.cuDeviceGet(&device_, index), "cuDeviceGet", concat("cuda:", index));
    if (attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) == 0) {
      throw DriverError(concat("cuda:", index, " has no virtual memory management"),
                        "cuDeviceGetAttribute", kNotSupported, 0);
    }
    can_export_ = attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) != 0 &&
                  cuda_.cuMemExportToShareableHandle != nullptr;
    can_rdma_ = attribute(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED) != 0;
    if (attribute(kHostNumaVmmSupported) != 0) {
      numa_node_ = std::max(attribute(kHostNumaId), 0);  // -1: no NUMA here, and 0 is to be said
    }
    auto wanted = properties(device_location());
    cuda_.require(cuda_.cuMemGetAllocationGranularity(&granularity_, &wanted,
                                                      CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                  "cuMemGetAllocationGranularity", concat("cuda:", index));
    cuda_.require(cuda_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain",
                  concat("no context on cuda:", index));
  }

  ~CudaDriver() override {
    report(cuda_.cuDevicePrimaryCtxRelease(device_), "cuDevicePrimaryCtxRelease");
  }

  std::string name() const override { return concat("cuda:", index_); }
  DeviceKind kind() const noexcept override { return DeviceKind::kCuda; }
  int device_index() const noexcept override { return index_; }
  std::size_t granularity_bytes() const noexcept override { return granularity_; }
  std::string describe(Result code) const override { return cuda_.describe(code); }

  Result memory_info(MemoryInfo* info) noexcept override {
    return in_context([&] { return cuda_.cuMemGetInfo(&info->free_bytes, &info->total_bytes); });
  }

  Result mem_create(MemHandle* handle, std::size_t bytes, bool exportable) noexcept override {
    if (exportable && !can_export_) return kNotSupported;
    auto wanted = properties(device_location());
    if (exportable) {
      wanted.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
      wanted.allocFlags.gpuDirectRDMACapable = can_rdma_ ? 1 : 0;
    }
    CUmemGenericAllocationHandle created = 0;
    Result result = relaxed([&] { return cuda_.cuMemCreate(&created, bytes, &wanted, 0); });
    *handle = created;
    return result;
  }
  Result mem_release(MemHandle handle) noexcept override {
    return relaxed([&] { return cuda_.cuMemRelease(handle); });
  }

  Result mem_export(int* fd, MemHandle handle) noexcept override {
    if (!can_export_) return kNotSupported;
    int exported = -1;
    Result result = relaxed([&] {
      return cuda_.cuMemExportToShareableHandle(&exported, handle,
                                                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    });
    if (result != kSuccess) return result;
    fcntl(exported, F_SETFD, FD_CLOEXEC);
    *fd = exported;
    return kSuccess;
  }
  // The size is the exporter's word: a wrong one is found by mem_map.
  Result mem_import(MemHandle* handle, int fd, std::size_t bytes) noexcept override {
    if (cuda_.cuMemImportFromShareableHandle == nullptr) return kNotSupported;
    if (bytes == 0 || bytes % granularity_ != 0) return kInvalidValue;
    auto* shared = reinterpret_cast<void*>(static_cast<std::intptr_t>(fd));
    CUmemGenericAllocationHandle imported = 0;
    Result result = relaxed([&] {
      return cuda_.cuMemImportFromShareableHandle(&imported, shared,
                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    });
    *handle = imported;
    return result;
  }

  Result address_reserve(Address* address, std::size_t bytes,
                         std::size_t alignment) noexcept override {
    CUdeviceptr reserved = 0;
    Result result =
        relaxed([&] { return cuda_.cuMemAddressReserve(&reserved, bytes, alignment, 0, 0); });
    *address = reserved;
    return result;
  }
  Result address_free(Address address, std::size_t bytes) noexcept override {
    return relaxed([&] { return cuda_.cuMemAddressFree(address, bytes); });
  }

  Result mem_map(Address address, std::size_t bytes, std::size_t offset,
                 MemHandle handle) noexcept override {
    return relaxed([&] { return cuda_.cuMemMap(address, bytes, offset, handle, 0); });
  }
  Result mem_set_access(Address address, std::size_t bytes, Access access) noexcept override {
    CUmemAccessDesc wanted{};
    wanted.location = device_location();
    wanted.flags = access == Access::kReadWrite ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                   : access == Access::kRead    ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                                : CU_MEM_ACCESS_FLAGS_PROT_NONE;
    return relaxed([&] { return cuda_.cuMemSetAccess(address, bytes, &wanted, 1); });
  }
  Result mem_unmap(Address address, std::size_t bytes) noexcept override {
    return relaxed([&] { return cuda_.cuMemUnmap(address, bytes); });
  }

  Result host_alloc(void** memory, std::size_t bytes) noexcept override {
    // Portable: page-locked for every context, so that one image serves several devices.
    return in_context(
        [&] { return cuda_.cuMemHostAlloc(memory, bytes, CU_MEMHOSTALLOC_PORTABLE); });
  }
  Result host_free(void* memory) noexcept override {
    auto numa = take(numa_memory_, memory);
    if (numa.empty()) return in_context([&] { return cuda_.cuMemFreeHost(memory); });
    auto& [bytes, handle, mapped, reserved] = numa.mapped();
    Result result = mapped ? mem_unmap(numa.key(), bytes) : kSuccess;
    mapped = result != kSuccess;
    if (!mapped && reserved) {
      result = address_free(numa.key(), bytes);
      reserved = result != kSuccess;
    }
    if (!reserved) result = mem_release(handle);
    if (result != kSuccess) put_back(numa_memory_, std::move(numa));
    return result;
  }

  Result host_alloc_numa(void** memory, std::size_t bytes) noexcept override {
    if (!numa_node_) return kNotSupported;
    CUmemLocation node{};
    node.type = kHostNumaLocation;
    node.id = *numa_node_;
    auto wanted = properties(node);
    std::size_t granule = 0;
    Result result = cuda_.cuMemGetAllocationGranularity(&granule, &wanted,
                                                        CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    if (result != kSuccess) return result;
    if (bytes == 0) return kInvalidValue;
    std::size_t size = (bytes + granule - 1) / granule * granule;

    CUmemGenericAllocationHandle handle = 0;
    result = relaxed([&] { return cuda_.cuMemCreate(&handle, size, &wanted, 0); });
    if (result != kSuccess) return result;
    Address address = 0;
    if (result = address_reserve(&address, size, granule); result == kSuccess) {
      result = map_numa(address, size, handle, node);
      if (result != kSuccess) report(address_free(address, size), "cuMemAddressFree");
    }
    if (result != kSuccess) {
      report(mem_release(handle), "cuMemRelease");
      return result;
    }
    std::lock_guard lock(mutex_);
    numa_memory_.emplace(address, NumaMemory{.bytes = size, .handle = handle});
    *memory = pointer(address);
    return kSuccess;
  }

  // Registered in pieces, and copied in them too: the driver refuses a copy that touches two.
  Result host_register(void* memory, std::size_t bytes) noexcept override {
    if (cuda_.cuMemHostRegister == nullptr) return kNotSupported;
    Address begin = address_of(memory);
    if (begin == 0 || bytes == 0 || begin % page_bytes_ != 0) return kInvalidValue;
    for (std::size_t done = 0; done < bytes; done += kRegistrationBytes) {
      std::size_t piece = std::min(kRegistrationBytes, bytes - done);
      Result result = in_context([&] {
        return cuda_.cuMemHostRegister(pointer(begin + done), piece, CU_MEMHOSTREGISTER_PORTABLE);
      });
      if (result == kSuccess) continue;
      report(unregister_pieces(begin, &done), "cuMemHostUnregister");
      return result;
    }
    std::lock_guard lock(mutex_);
    registrations_.emplace(begin, bytes);
    return kSuccess;
  }
  Result host_unregister(void* memory) noexcept override {
    if (cuda_.cuMemHostUnregister == nullptr) return kNotSupported;
    auto found = take(registrations_, memory);
    if (found.empty()) return kHostMemoryNotRegistered;
    Result result = unregister_pieces(found.key(), &found.mapped());
    if (result != kSuccess) put_back(registrations_, std::move(found));
    return result;
  }

  Result stream_create(StreamId* stream) noexcept override {
    CUstream created = nullptr;
    Result result =
        in_context([&] { return cuda_.cuStreamCreate(&created, CU_STREAM_NON_BLOCKING); });
    *stream = reinterpret_cast<StreamId>(created);
    return result;
  }
  Result stream_destroy(StreamId stream) noexcept override {
    return in_context([&] { return cuda_.cuStreamDestroy(stream_of(stream)); });
  }
  Result stream_synchronize(StreamId stream) noexcept override {
    return in_context([&] { return cuda_.cuStreamSynchronize(stream_of(stream)); });
  }
  Result stream_wait_event(StreamId stream, EventId event) noexcept override {
    return in_context(
        [&] { return cuda_.cuStreamWaitEvent(stream_of(stream), event_of(event), 0); });
  }
  Result stream_is_capturing(bool* capturing, StreamId stream) noexcept override {
    if (cuda_.cuStreamIsCapturing == nullptr) return kNotSupported;
    auto status = CU_STREAM_CAPTURE_STATUS_NONE;
    Result result =
        in_context([&] { return cuda_.cuStreamIsCapturing(stream_of(stream), &status); });
    // The legacy default stream waits for all others, so it is no stream to use in their captures.
    bool implicitly = result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    if (result != kSuccess && !implicitly) return result;
    *capturing = implicitly || status != CU_STREAM_CAPTURE_STATUS_NONE;
    return kSuccess;
  }

  Result memcpy_h2d_async(Address destination, void const* source, std::size_t bytes,
                          StreamId stream) noexcept override {
    return in_pieces(source, bytes, [&](std::size_t offset, std::size_t piece) {
      return cuda_.cuMemcpyHtoDAsync(destination + offset, pointer(address_of(source) + offset),
                                     piece, stream_of(stream));
    });
  }
  Result memcpy_d2h_async(void* destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override {
    return in_pieces(destination, bytes, [&](std::size_t offset, std::size_t piece) {
      return cuda_.cuMemcpyDtoHAsync(pointer(address_of(destination) + offset), source + offset,
                                     piece, stream_of(stream));
    });
  }
  Result memcpy_d2d_async(Address destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override {
    return in_context(
        [&] { return cuda_.cuMemcpyDtoDAsync(destination, source, bytes, stream_of(stream)); });
  }
  Result memset_async(Address destination, std::uint8_t value, std::size_t bytes,
                      StreamId stream) noexcept override {
    return in_context(
        [&] { return cuda_.cuMemsetD8Async(destination, value, bytes, stream_of(stream)); });
  }

  Result event_create(EventId* event) noexcept override {
    CUevent created = nullptr;
    // Waiters sleep instead of spinning (the compute thread needs the core), and nothing is timed.
    unsigned flags = CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING;
    Result result = in_context([&] { return cuda_.cuEventCreate(&created, flags); });
    *event = reinterpret_cast<EventId>(created);
    return result;
  }
  Result event_destroy(EventId event) noexcept override {
    return in_context([&] { return cuda_.cuEventDestroy(event_of(event)); });
  }
  Result event_record(EventId event, StreamId stream) noexcept override {
    return in_context([&] { return cuda_.cuEventRecord(event_of(event), stream_of(stream)); });
  }
  Result event_query(EventId event) noexcept override {
    return in_context([&] { return cuda_.cuEventQuery(event_of(event)); });
  }
  Result event_synchronize(EventId event) noexcept override {
    return in_context([&] { return cuda_.cuEventSynchronize(event_of(event)); });
  }

 private:
  struct NumaMemory {
    std::size_t bytes = 0;
    MemHandle handle = 0;
    bool mapped = true;  // false from where a host_free that failed got to
    bool reserved = true;
  };

  static void* pointer(Address address) { return reinterpret_cast<void*>(address); }
  static Address address_of(void const* memory) { return reinterpret_cast<Address>(memory); }
  static CUstream stream_of(StreamId stream) { return reinterpret_cast<CUstream>(stream); }
  static CUevent event_of(EventId event) { return reinterpret_cast<CUevent>(event); }

  // 0 for what this driver is too old to know.
  [[nodiscard]] int attribute(CUdevice_attribute wanted) const noexcept {
    int value = 0;
    return cuda_.cuDeviceGetAttribute(&value, wanted, device_) == CUDA_SUCCESS ? value : 0;
  }

  [[nodiscard]] CUmemLocation device_location() const {
    CUmemLocation here{};
    here.type = CU_MEM_LOCATION_TYPE_DEVICE;
    here.id = index_;
    return here;
  }

  [[nodiscard]] static CUmemAllocationProp properties(CUmemLocation const& location) {
    CUmemAllocationProp wanted{};
    wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.location = location;
    return wanted;
  }

  // For the host and for this device.
  Result map_numa(Address address, std::size_t bytes, MemHandle handle,
                  CUmemLocation const& node) noexcept {
    if (Result result = mem_map(address, bytes, 0, handle); result != kSuccess) return result;
    std::array<CUmemAccessDesc, 2> users{};
    users[0].location = node;
    users[1].location = device_location();
    for (auto& user : users) user.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    Result result =
        relaxed([&] { return cuda_.cuMemSetAccess(address, bytes, users.data(), users.size()); });
    if (result != kSuccess) report(mem_unmap(address, bytes), "cuMemUnmap");
    return result;
  }

  // Driver calls run outside the lock: a copy must not wait for gigabytes being pinned.
  template <typename Value>
  typename std::map<Address, Value>::node_type take(std::map<Address, Value>& from,
                                                    void const* memory) {
    std::lock_guard lock(mutex_);
    return from.extract(address_of(memory));
  }
  template <typename Value>
  void put_back(std::map<Address, Value>& to, typename std::map<Address, Value>::node_type node) {
    std::lock_guard lock(mutex_);
    to.insert(std::move(node));
  }

  // The last piece first; *bytes is what is left, so that a failure can be followed by another try.
  Result unregister_pieces(Address begin, std::size_t* bytes) noexcept {
    while (*bytes > 0) {
      std::size_t last = (*bytes - 1) / kRegistrationBytes * kRegistrationBytes;
      Result result = in_context([&] { return cuda_.cuMemHostUnregister(pointer(begin + last)); });
      if (result != kSuccess) return result;
      *bytes = last;
    }
    return kSuccess;
  }

  // How many bytes from there on lie in one registration; all of them if in none.
  std::size_t bytes_in_one_piece(Address host, std::size_t bytes) {
    std::lock_guard lock(mutex_);
    auto next = registrations_.upper_bound(host);
    if (next == registrations_.begin()) return bytes;
    auto const& [begin, size] = *std::prev(next);
    if (host >= begin + size) return bytes;
    return std::min(bytes, kRegistrationBytes - (host - begin) % kRegistrationBytes);
  }

  // copy(offset, bytes) for each part. When a later part is refused the earlier ones are on their
  // way, as earlier copies are: the stream is to be waited for in any case.
  template <typename Copy>
  Result in_pieces(void const* host, std::size_t bytes, Copy copy) {
    return in_context([&] {
      auto result = CUDA_SUCCESS;
      std::size_t done = 0;
      do {
        std::size_t piece = bytes_in_one_piece(address_of(host) + done, bytes - done);
        result = copy(done, piece);
        done += piece;
      } while (result == CUDA_SUCCESS && done < bytes);
      return result;
    });
  }

  // Runs the call where it cannot break a capture into a graph by another thread: most captures are
  // of the mode that forbids "unsafe" calls (waiting, queries, allocation) to the whole process.
  template <typename Call>
  Result relaxed(Call call) const {
    auto exchange = cuda_.cuThreadExchangeStreamCaptureMode;
    if (exchange == nullptr) return call();
    auto mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    if (Result result = exchange(&mode); result != kSuccess) return result;
    Result result = call();
    report(exchange(&mode), "cuThreadExchangeStreamCaptureMode");
    return result;
  }

  // And in this device's context; then puts the caller's own back: which device a thread of torch
  // is on is not ours to change.
  template <typename Call>
  Result in_context(Call call) const {
    CUcontext current = nullptr;
    if (Result result = cuda_.cuCtxGetCurrent(&current); result != kSuccess) return result;
    if (current == context_) return relaxed(call);
    if (Result result = cuda_.cuCtxPushCurrent(context_); result != kSuccess) return result;
    Result result = relaxed(call);
    report(cuda_.cuCtxPopCurrent(&current), "cuCtxPopCurrent");
    return result;
  }

  Cuda cuda_;
  int index_;
  std::size_t const page_bytes_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  std::size_t granularity_ = 0;
  bool can_export_ = false;
  bool can_rdma_ = false;
  std::optional<int> numa_node_;  // near the device, where memory can be created
  std::mutex mutex_;              // guards all that follows
  std::map<Address, NumaMemory> numa_memory_;
  std::map<Address, std::size_t> registrations_;
};

}  // namespace

std::shared_ptr<Driver> make_cuda_driver(int index, std::string const& library) {
  return std::make_shared<CudaDriver>(index, library);
}

int count_cuda_devices(std::string const& library) noexcept {
  try {
    Cuda cuda(library);
    int count = 0;
    if (cuda.cuInit(0) != CUDA_SUCCESS || cuda.cuDeviceGetCount(&count) != CUDA_SUCCESS) return 0;
    return std::max(count, 0);
  } catch (std::exception const&) {  // "none" is the whole answer to this question
    return 0;
  }
}

}  // namespace aegaeon
