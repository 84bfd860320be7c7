#include "transfer/host_memory.hpp"

#include <linux/memfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <utility>

#include "error.hpp"
#include "transfer/file.hpp"
#include "transfer/host_pages.hpp"

namespace aegaeon {
namespace {

constexpr std::size_t kProbeBytes = kHugePageBytes;

// What is left to the driver to free.
class DriverMemory {
 public:
  DriverMemory(std::shared_ptr<Driver> driver, void* memory)
      : driver_(std::move(driver)), memory_(memory) {}
  ~DriverMemory() { report(driver_->host_free(memory_), "host_free"); }
  DriverMemory(DriverMemory const&) = delete;  // owns the memory
  DriverMemory& operator=(DriverMemory const&) = delete;

 private:
  std::shared_ptr<Driver> const driver_;
  void* const memory_;
};

// Pages of ours; unlocked before they are unmapped.
struct LockedPages {
  LockedPages(int fd, std::size_t bytes) : pages(fd, bytes) {}
  MappedPages pages;
  std::optional<Registration> registration;
};

HostMemory of_driver(std::shared_ptr<Driver> driver, void* memory, std::size_t bytes) {
  bool pinned = driver->kind() == DeviceKind::kCuda;
  return {.data = static_cast<std::byte*>(memory),
          .size_bytes = bytes,
          .pinned = pinned,
          .keep = std::make_shared<DriverMemory>(std::move(driver), memory)};
}

struct Request {
  std::shared_ptr<Driver> const& driver;
  std::size_t bytes;
  HostMemoryOptions const& options;
  std::string remark;  // of the answer
};

HostMemory numa_memory(Request& request) {
  auto [driver, bytes] = std::pair{request.driver, request.bytes};
  void* memory = nullptr;
  check(*driver, driver->host_alloc_numa(&memory, bytes), "host_alloc_numa", bytes);
  auto result = of_driver(driver, memory, bytes);
  fill_zero(result.data, bytes, request.options.num_threads);
  request.remark = "on the device's node";
  return result;
}

HostMemory driver_memory(Request& request) {
  require_available(request.bytes);
  auto result = allocate_by_driver(request.driver, request.bytes);
  fill_zero(result.data, request.bytes, request.options.num_threads);
  request.remark = "allocated by the driver";
  return result;
}

// Maps, places and touches the pages.
std::shared_ptr<LockedPages> make_pages(Request& request, int fd, std::size_t bytes) {
  auto result = std::make_shared<LockedPages>(fd, bytes);
  auto* data = result->pages.data();
  prefer_huge_pages(data, bytes);
  if (request.options.numa_node) {
    auto problem = prefer_node(data, bytes, *request.options.numa_node);
    if (!problem.empty()) {
      request.remark +=
          concat("not placed on node ", *request.options.numa_node, " (", problem, "); ");
    }
  }
  populate(fd, data, bytes, request.options.num_threads);
  return result;
}

HostMemory locked(Request& request, std::shared_ptr<LockedPages> pages) {
  auto piece = request.options.piece_bytes;
  auto* data = pages->pages.data();
  pages->registration.emplace(request.driver, data, request.bytes, piece);
  return {.data = data,
          .size_bytes = request.bytes,
          .pinned = request.driver->kind() == DeviceKind::kCuda,
          .piece_bytes = request.bytes > piece ? piece : 0,
          .keep = std::move(pages)};
}

// "always [madvise] never": the one in brackets.
std::optional<std::string> chosen_in(std::string const& path) {
  std::ifstream file(path);
  for (std::string word; file >> word;) {
    if (word.front() == '[' && word.back() == ']') return word.substr(1, word.size() - 2);
  }
  return std::nullopt;
}

FileDescriptor anonymous_file(unsigned flags, std::size_t bytes) {
  FileDescriptor file(memfd_create("aegaeon-images", MFD_CLOEXEC | flags));
  if (!file) throw_errno("memfd_create", "aegaeon-images");
  if (ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) {
    throw_errno("ftruncate", "aegaeon-images");
  }
  return file;
}

HostMemory hugetlb_memory(Request& request) {
  auto bytes = (request.bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  auto file = anonymous_file(MFD_HUGETLB | MFD_HUGE_2MB, bytes);
  try {
    auto pages = make_pages(request, file.get(), bytes);
    request.remark += "reserved huge pages of 2 MiB";
    return locked(request, std::move(pages));
  } catch (OutOfMemory const& error) {
    throw OutOfMemory(concat(error.what(), "; reserve some: sysctl vm.nr_hugepages"), error.call,
                      error.code, error.bytes);
  }
}

// Most systems allow transparent huge pages to anonymous memory that asks, and to shared memory
// not.
HostMemory thp_memory(Request& request) {
  if (chosen_in("/sys/kernel/mm/transparent_hugepage/enabled").value_or("never") == "never") {
    throw DriverError("transparent_hugepage/enabled forbids them", "madvise", kNotSupported, 0);
  }
  require_available(request.bytes);
  auto pages = make_pages(request, -1, request.bytes);
  auto* data = pages->pages.data();
  // A write after a fork would get a new page, and the device go on reading the old one.
  if (madvise(data, request.bytes, MADV_DONTFORK) != 0) throw_errno("madvise", "memory");
  auto huge = huge_bytes(data, request.bytes);
  request.remark += concat("huge pages: ", human_bytes(huge), " of ", human_bytes(request.bytes));
  return locked(request, std::move(pages));
}

HostMemory shm_memory(Request& request) {
  require_available(request.bytes);
  auto memory = anonymous_file(0, request.bytes);
  auto pages = make_pages(request, memory.get(), request.bytes);
  auto huge = huge_bytes(pages->pages.data(), request.bytes);
  request.remark +=
      concat("shared pages, huge: ", human_bytes(huge), " of ", human_bytes(request.bytes));
  return locked(request, std::move(pages));
}

HostMemory pageable_memory(Request& request) {
  require_available(request.bytes);
  auto pages = make_pages(request, -1, request.bytes);
  request.remark += "not locked: copies are slow";
  auto* data = pages->pages.data();
  return {.data = data, .size_bytes = request.bytes, .keep = std::move(pages)};
}

HostMemory allocate_kind(Request& request, HostMemoryKind kind) {
  switch (kind) {
    case HostMemoryKind::kNuma:
      return numa_memory(request);
    case HostMemoryKind::kHugetlb:
      return hugetlb_memory(request);
    case HostMemoryKind::kThp:
      return thp_memory(request);
    case HostMemoryKind::kShm:
      return shm_memory(request);
    case HostMemoryKind::kDriver:
      return driver_memory(request);
    case HostMemoryKind::kPageable:
      return pageable_memory(request);
  }
  throw std::invalid_argument("unknown kind of host memory");
}

}  // namespace

std::size_t HostMemory::copyable_bytes(std::size_t offset) const noexcept {
  auto left = size_bytes - std::min(offset, size_bytes);
  if (piece_bytes == 0) return left;
  return std::min(left, piece_bytes - (offset_bytes + offset) % piece_bytes);
}

HostMemory HostMemory::part(std::size_t offset, std::size_t bytes,
                            std::shared_ptr<void const> keep_part) const {
  HostMemory result = *this;
  result.data += offset;
  result.size_bytes = bytes;
  result.offset_bytes += offset;
  result.keep = std::move(keep_part);
  return result;
}

HostMemory allocate_host_memory(std::shared_ptr<Driver> const& driver, std::size_t bytes,
                                HostMemoryOptions const& options,
                                std::vector<HostMemoryAttempt>* attempts) {
  if (bytes == 0) throw std::invalid_argument("host memory has at least one byte");
  std::string reasons;
  bool out_of_memory = false;
  for (auto kind : options.kinds) {
    Request request{.driver = driver, .bytes = bytes, .options = options, .remark = {}};
    std::string reason;
    try {
      auto result = allocate_kind(request, kind);
      attempts->push_back({.kind = kind, .worked = true, .remark = std::move(request.remark)});
      return result;
    } catch (OutOfMemory const& error) {
      out_of_memory = true;
      reason = error.what();
    } catch (Error const& error) {
      reason = error.what();
    }
    reasons += (reasons.empty() ? "" : "; ") + reason;
    attempts->push_back({.kind = kind, .worked = false, .remark = std::move(reason)});
  }
  auto message = concat("no kind of host memory gives ", human_bytes(bytes), ": ", reasons);
  if (out_of_memory) {
    throw OutOfMemory(message, "allocate_host_memory", kDriverOutOfMemory, bytes);
  }
  throw DriverError(message, "allocate_host_memory", kNotSupported, bytes);
}

std::vector<HostMemoryAttempt> probe_host_memory(std::shared_ptr<Driver> const& driver) {
  std::vector<HostMemoryAttempt> attempts;
  for (auto kind : kHostMemoryKinds) {
    HostMemoryOptions options;
    options.kinds = {kind};
    try {
      allocate_host_memory(driver, kProbeBytes, options, &attempts);
    } catch (Error const&) {  // is among the attempts, with its reason
    }
  }
  return attempts;
}

HostMemory allocate_by_driver(std::shared_ptr<Driver> driver, std::size_t bytes) {
  void* memory = nullptr;
  check(*driver, driver->host_alloc(&memory, bytes), "host_alloc", bytes);
  return of_driver(std::move(driver), memory, bytes);
}

}  // namespace aegaeon
