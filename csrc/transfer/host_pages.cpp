#include "transfer/host_pages.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <system_error>

#include "error.hpp"
#include "transfer/parallel.hpp"

namespace aegaeon {
namespace {

constexpr std::size_t kPartBytes = std::size_t{32} << 20;  // of work that is done in parallel

#ifndef MADV_POPULATE_WRITE
constexpr int MADV_POPULATE_WRITE = 23;
#endif

std::string error_text(int code) {
  return std::generic_category().message(code);
}

[[noreturn]] void throw_out_of_memory(char const* call, std::size_t bytes, std::string const& why) {
  throw OutOfMemory(concat(call, " of ", human_bytes(bytes), " of host memory: ", why), call,
                    kDriverOutOfMemory, bytes);
}

void in_parts(std::byte* data, std::size_t bytes, std::size_t num_threads,
              std::function<void(std::byte* part, std::size_t part_bytes)> const& work) {
  parallel_for((bytes + kPartBytes - 1) / kPartBytes, num_threads, [&](std::size_t i) {
    work(data + i * kPartBytes, std::min(kPartBytes, bytes - i * kPartBytes));
  });
}

// The first number in a file; nothing for "max" or an unreadable one.
std::optional<std::size_t> number_in(std::string const& path) {
  std::ifstream file(path);
  std::size_t number = 0;
  if (file >> number) return number;
  return std::nullopt;
}

// The number after a key, in a file of lines "key number ...".
std::optional<std::size_t> number_after(std::string const& path, std::string const& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word;
    std::size_t number = 0;
    if (words >> word && word == key && words >> number) return number;
  }
  return std::nullopt;
}

}  // namespace

MappedPages::MappedPages(int fd, std::size_t bytes) : bytes_(bytes) {
  // More addresses than needed, so that a huge page's multiple is among them.
  if (bytes > std::numeric_limits<std::size_t>::max() - 2 * kHugePageBytes) {
    throw_out_of_memory("mmap", bytes, "more than there are addresses");
  }
  std::size_t room = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  void* raw = mmap(nullptr, room + kHugePageBytes, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw_out_of_memory("mmap", bytes, error_text(errno));
  auto begin = reinterpret_cast<std::uintptr_t>(raw);
  auto aligned = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  auto* place = reinterpret_cast<std::byte*>(aligned);
  if (aligned > begin) munmap(raw, aligned - begin);
  // Behind the last page: for memory of huge pages the range is as long as they are.
  auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::size_t used = (bytes + page - 1) / page * page;
  munmap(place + used, begin + room + kHugePageBytes - aligned - used);
  int flags = MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED);
  if (mmap(place, bytes, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED) {
    int code = errno;
    munmap(place, used);
    throw_out_of_memory("mmap", bytes, error_text(code));
  }
  data_ = place;
}

MappedPages::~MappedPages() {
  munmap(data_, bytes_);
}

void MappedPages::make_read_only() {
  if (mprotect(data_, bytes_, PROT_READ) != 0) {
    throw_out_of_memory("mprotect", bytes_, error_text(errno));
  }
}

void prefer_huge_pages(std::byte* data, std::size_t bytes) noexcept {
  madvise(data, bytes, MADV_HUGEPAGE);
}

std::size_t huge_bytes(std::byte const* data, std::size_t bytes) {
  auto begin = reinterpret_cast<std::uintptr_t>(data);
  std::ifstream file("/proc/self/smaps");
  bool within = false;
  std::size_t total = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::uintptr_t from = 0, to = 0;
    char dash = 0;
    if (words >> std::hex >> from >> dash >> to && dash == '-') {  // the first line of a mapping
      within = from >= begin && from < begin + bytes;
      continue;
    }
    if (!within) continue;
    std::istringstream field(line);
    std::string name;
    std::size_t kib = 0;
    if (field >> name >> kib && (name == "AnonHugePages:" || name == "ShmemPmdMapped:")) {
      total += kib * 1024;
    }
  }
  return total;
}

void populate(int fd, std::byte* data, std::size_t bytes, std::size_t num_threads) {
  try {
    in_parts(data, bytes, num_threads, [](std::byte* part, std::size_t part_bytes) {
      while (madvise(part, part_bytes, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR) continue;
        throw std::system_error(errno, std::generic_category());
      }
    });
  } catch (std::system_error const& error) {
    int code = error.code().value();
    if (code == EINVAL) {
      populate_by_touch(fd, data, bytes, num_threads);
      return;
    }
    // EFAULT is what a touch would have answered with SIGBUS: the file system is full.
    throw_out_of_memory("populate", bytes,
                        code == EFAULT ? "no space left for the pages" : error_text(code));
  }
}

void populate_by_touch(int fd, std::byte* data, std::size_t bytes, std::size_t num_threads) {
  if (fd >= 0) {  // claims the pages, so that no touch fails
    int code = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
    if (code != 0) throw_out_of_memory("posix_fallocate", bytes, error_text(code));
  }
  auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  in_parts(data, bytes, num_threads, [page](std::byte* part, std::size_t part_bytes) {
    for (std::size_t offset = 0; offset < part_bytes; offset += page) {
      auto volatile* byte = part + offset;
      *byte = *byte;
    }
  });
}

std::string prefer_node(std::byte* data, std::size_t bytes, int numa_node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED
  constexpr std::size_t kWordBits = 8 * sizeof(unsigned long);
  std::array<unsigned long, 1024 / kWordBits> nodes{};
  auto node = static_cast<std::size_t>(numa_node);
  if (numa_node < 0 || node >= 1024) return concat("there is no node ", numa_node);
  nodes[node / kWordBits] = 1UL << (node % kWordBits);
  if (syscall(SYS_mbind, data, bytes, kPreferred, nodes.data(), 1024UL, 0U) == 0) return "";
  return error_text(errno);
}

void fill_zero(std::byte* data, std::size_t bytes, std::size_t num_threads) {
  in_parts(data, bytes, num_threads,
           [](std::byte* part, std::size_t part_bytes) { std::memset(part, 0, part_bytes); });
}

std::size_t available_host_bytes(std::string const& proc, std::string const& cgroups) {
  auto available = std::numeric_limits<std::size_t>::max();
  if (auto kib = number_after(proc + "/meminfo", "MemAvailable:")) available = *kib * 1024;
  std::string group;
  std::ifstream file(proc + "/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("0::/")) group = line.substr(3);
  }
  // A container that sees its own group as the root finds the limit there.
  for (;;) {
    auto folder = cgroups + (group == "/" ? "" : group);
    auto limit = number_in(folder + "/memory.max");
    auto used = number_in(folder + "/memory.current");
    if (limit && used) {
      // The cache of files is counted as used, but gives way.
      auto cache = number_after(folder + "/memory.stat", "inactive_file").value_or(0) +
                   number_after(folder + "/memory.stat", "active_file").value_or(0);
      auto held = *used - std::min(*used, cache);
      available = std::min(available, *limit - std::min(*limit, held));
    }
    if (group.empty() || group == "/") return available;
    group.resize(group.find_last_of('/'));
  }
}

void require_available(std::size_t bytes) {
  auto available = available_host_bytes();
  if (bytes <= available) return;
  throw_out_of_memory("allocation", bytes,
                      concat("only ", human_bytes(available), " can be had without swapping"));
}

}  // namespace aegaeon
