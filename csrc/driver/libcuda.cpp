// The driver interface over libcuda.so.1, opened at run time: the module imports, and everything
// else in it works, on a machine without a GPU. The only file that names cu* symbols.
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
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
// clang-format on

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
    auto resolve = [&](auto& function, char const* symbol) {
      void* found = dlsym(handle, symbol);
      if (found == nullptr) {
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
#define AEGAEON_RESOLVE(symbol) resolve(symbol, AEGAEON_TEXT(symbol));
    AEGAEON_CUDA_FUNCTIONS(AEGAEON_RESOLVE)
#undef AEGAEON_RESOLVE
#undef AEGAEON_TEXT
  }

#define AEGAEON_DECLARE(symbol) decltype(&::symbol) symbol = nullptr;
  AEGAEON_CUDA_FUNCTIONS(AEGAEON_DECLARE)
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
    int supported = 0;
    auto attribute = CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    cuda_.require(cuda_.cuDeviceGetAttribute(&supported, attribute, device_),
                  "cuDeviceGetAttribute", concat("cuda:", index));
    if (supported == 0) {
      throw DriverError(concat("cuda:", index, " has no virtual memory management"),
                        "cuDeviceGetAttribute", kNotSupported, 0);
    }
    auto wanted = properties();
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
    return with_context([&] { return cuda_.cuMemGetInfo(&info->free_bytes, &info->total_bytes); });
  }

  Result mem_create(MemHandle* handle, std::size_t bytes) noexcept override {
    auto wanted = properties();
    CUmemGenericAllocationHandle created = 0;
    Result result = cuda_.cuMemCreate(&created, bytes, &wanted, 0);
    *handle = created;
    return result;
  }
  Result mem_release(MemHandle handle) noexcept override { return cuda_.cuMemRelease(handle); }

  Result address_reserve(Address* address, std::size_t bytes,
                         std::size_t alignment) noexcept override {
    CUdeviceptr reserved = 0;
    Result result = cuda_.cuMemAddressReserve(&reserved, bytes, alignment, 0, 0);
    *address = reserved;
    return result;
  }
  Result address_free(Address address, std::size_t bytes) noexcept override {
    return cuda_.cuMemAddressFree(address, bytes);
  }

  Result mem_map(Address address, std::size_t bytes, std::size_t offset,
                 MemHandle handle) noexcept override {
    return cuda_.cuMemMap(address, bytes, offset, handle, 0);
  }
  Result mem_set_access(Address address, std::size_t bytes, Access access) noexcept override {
    CUmemAccessDesc wanted{};
    wanted.location = location();
    wanted.flags = access == Access::kReadWrite ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                   : access == Access::kRead    ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                                : CU_MEM_ACCESS_FLAGS_PROT_NONE;
    return cuda_.cuMemSetAccess(address, bytes, &wanted, 1);
  }
  Result mem_unmap(Address address, std::size_t bytes) noexcept override {
    return cuda_.cuMemUnmap(address, bytes);
  }

  Result host_alloc(void** memory, std::size_t bytes) noexcept override {
    // Portable: page-locked for every context, so that one image serves several devices.
    return with_context(
        [&] { return cuda_.cuMemHostAlloc(memory, bytes, CU_MEMHOSTALLOC_PORTABLE); });
  }
  Result host_free(void* memory) noexcept override {
    return with_context([&] { return cuda_.cuMemFreeHost(memory); });
  }

  Result stream_create(StreamId* stream) noexcept override {
    CUstream created = nullptr;
    Result result =
        with_context([&] { return cuda_.cuStreamCreate(&created, CU_STREAM_NON_BLOCKING); });
    *stream = reinterpret_cast<StreamId>(created);
    return result;
  }
  Result stream_destroy(StreamId stream) noexcept override {
    return with_context([&] { return cuda_.cuStreamDestroy(stream_of(stream)); });
  }
  Result stream_synchronize(StreamId stream) noexcept override {
    return with_context([&] { return cuda_.cuStreamSynchronize(stream_of(stream)); });
  }
  Result stream_wait_event(StreamId stream, EventId event) noexcept override {
    return with_context(
        [&] { return cuda_.cuStreamWaitEvent(stream_of(stream), event_of(event), 0); });
  }

  Result memcpy_h2d_async(Address destination, void const* source, std::size_t bytes,
                          StreamId stream) noexcept override {
    return with_context(
        [&] { return cuda_.cuMemcpyHtoDAsync(destination, source, bytes, stream_of(stream)); });
  }
  Result memcpy_d2h_async(void* destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override {
    return with_context(
        [&] { return cuda_.cuMemcpyDtoHAsync(destination, source, bytes, stream_of(stream)); });
  }
  Result memcpy_d2d_async(Address destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override {
    return with_context(
        [&] { return cuda_.cuMemcpyDtoDAsync(destination, source, bytes, stream_of(stream)); });
  }
  Result memset_async(Address destination, std::uint8_t value, std::size_t bytes,
                      StreamId stream) noexcept override {
    return with_context(
        [&] { return cuda_.cuMemsetD8Async(destination, value, bytes, stream_of(stream)); });
  }

  Result event_create(EventId* event) noexcept override {
    CUevent created = nullptr;
    // Waiters sleep instead of spinning (the compute thread needs the core), and nothing is timed.
    unsigned flags = CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING;
    Result result = with_context([&] { return cuda_.cuEventCreate(&created, flags); });
    *event = reinterpret_cast<EventId>(created);
    return result;
  }
  Result event_destroy(EventId event) noexcept override {
    return with_context([&] { return cuda_.cuEventDestroy(event_of(event)); });
  }
  Result event_record(EventId event, StreamId stream) noexcept override {
    return with_context([&] { return cuda_.cuEventRecord(event_of(event), stream_of(stream)); });
  }
  Result event_query(EventId event) noexcept override {
    return with_context([&] { return cuda_.cuEventQuery(event_of(event)); });
  }
  Result event_synchronize(EventId event) noexcept override {
    return with_context([&] { return cuda_.cuEventSynchronize(event_of(event)); });
  }

 private:
  static CUstream stream_of(StreamId stream) { return reinterpret_cast<CUstream>(stream); }
  static CUevent event_of(EventId event) { return reinterpret_cast<CUevent>(event); }

  [[nodiscard]] CUmemLocation location() const {
    CUmemLocation here{};
    here.type = CU_MEM_LOCATION_TYPE_DEVICE;
    here.id = index_;
    return here;
  }

  [[nodiscard]] CUmemAllocationProp properties() const {
    CUmemAllocationProp wanted{};
    wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.location = location();
    return wanted;
  }

  // Runs the call in this device's context and puts the caller's own back: which device a thread
  // of torch is on is not ours to change.
  template <typename Call>
  Result with_context(Call call) const {
    CUcontext current = nullptr;
    if (Result result = cuda_.cuCtxGetCurrent(&current); result != kSuccess) return result;
    if (current == context_) return call();
    if (Result result = cuda_.cuCtxPushCurrent(context_); result != kSuccess) return result;
    Result result = call();
    Result popped = cuda_.cuCtxPopCurrent(&current);
    return result != kSuccess ? result : popped;
  }

  Cuda cuda_;
  int index_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  std::size_t granularity_ = 0;
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
