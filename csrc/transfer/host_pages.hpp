// Pages of host memory: mapping, placing and touching them, and how much there is to be had.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

namespace aegaeon {

inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

// A range of this process's addresses; unmapped in the end.
class MappedPages {
 public:
  // A new range, at a multiple of the huge page. fd: of a file to show, shared and from its start,
  // which the range outlives; -1: anonymous memory. Throws OutOfMemory.
  MappedPages(int fd, std::size_t bytes);
  ~MappedPages();
  MappedPages(MappedPages const&) = delete;  // owns the range
  MappedPages& operator=(MappedPages const&) = delete;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return bytes_; }
  void make_read_only();

 private:
  std::size_t const bytes_;
  std::byte* data_ = nullptr;
};

// Asks for transparent huge pages; they are not promised.
void prefer_huge_pages(std::byte* data, std::size_t bytes) noexcept;

// How much of it is in transparent huge pages.
std::size_t huge_bytes(std::byte const* data, std::size_t bytes);

// Makes the pages present, in parallel: touching is what pinning spends its time on. Throws
// OutOfMemory where a mere touch would end the process (SIGBUS).
// fd: of the file behind the pages, -1 for anonymous memory.
void populate(int fd, std::byte* data, std::size_t bytes, std::size_t num_threads);
// The same for kernels before 5.14, which have no call for it.
void populate_by_touch(int fd, std::byte* data, std::size_t bytes, std::size_t num_threads);

// Pages of the range not yet touched come from that node while it has any. Empty, or why not.
std::string prefer_node(std::byte* data, std::size_t bytes, int numa_node);

void fill_zero(std::byte* data, std::size_t bytes, std::size_t num_threads);

// What could be allocated without swapping or being killed: the machine's MemAvailable, and what
// every control group above this process leaves. The folders are parameters for tests.
std::size_t available_host_bytes(std::string const& proc = "/proc",
                                 std::string const& cgroups = "/sys/fs/cgroup");
// Throws OutOfMemory when that is less than `bytes`.
void require_available(std::size_t bytes);

}  // namespace aegaeon
