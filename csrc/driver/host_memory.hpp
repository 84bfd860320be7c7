// Physical memory of the host device: pieces of memfds, each with a parking place, which is where
// its page tables are while it is mapped nowhere.
//
// Small pieces share files, neighbours in the order of their making: what is neighbouring in a file
// and is mapped side by side is one area to the kernel, moves in one call, and counts once against
// vm.max_map_count. Exported memory has a file of its own, since a descriptor shows the whole file.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <map>
#include <memory>

#include "driver/driver.hpp"

namespace aegaeon {

inline void* pointer(Address address) noexcept {
  return reinterpret_cast<void*>(address);
}
inline Address address_of(void const* memory) noexcept {
  return reinterpret_cast<Address>(memory);
}
std::size_t page_bytes() noexcept;

// Inaccessible memory; 0 when there is no room for it.
Address reserve_aligned(std::size_t bytes, std::size_t alignment) noexcept;
// Replaces what is in the range by inaccessible memory.
bool make_inaccessible(Address address, std::size_t bytes) noexcept;

// What mremap can do on this kernel. MREMAP_DONTUNMAP of shared memory came with Linux 5.13.
struct PageTableMoves {
  bool pieces = false;  // one at a time
  bool runs = false;    // several neighbours in one call
};
PageTableMoves probe_page_table_moves() noexcept;
// Moves page tables and leaves the old range mapped, but empty: no other thread's mmap can land in
// it. The new range shows the same memory with the protection of the old one.
bool move_page_tables(Address from, Address to, std::size_t bytes) noexcept;
// One more view of shared memory, without page tables.
bool duplicate_view(Address from, Address to, std::size_t bytes) noexcept;

// Not thread-safe: the driver's mutex guards it.
class HostMemory {
 public:
  struct File {
    ~File();
    int fd = -1;
    Address parking = 0;
    std::size_t bytes = 0;
    ino_t inode = 0;                          // 0 of a shared file
    std::map<std::size_t, std::size_t> free;  // of a shared file: bytes by offset
  };
  struct Piece {
    File* file = nullptr;  // null: could not be had
    Address parking = 0;
    std::size_t bytes = 0;

    [[nodiscard]] bool is_followed_by(Piece const& next) const noexcept {
      return file == next.file && parking + bytes == next.parking;
    }
  };

  // New memory, all zero. exportable: file->fd may be given to others.
  Piece create(std::size_t bytes, bool exportable) noexcept;
  // Memory that somebody exported; fd stays the caller's. What could shrink beneath us is refused.
  Piece import(int fd, std::size_t bytes, Result* why_not) noexcept;
  // Nothing of it is mapped any more, except at its parking place.
  void destroy(Piece const& piece) noexcept;

 private:
  Piece take(File& file, std::size_t bytes) noexcept;
  File* open(std::size_t bytes) noexcept;
  File* keep(std::unique_ptr<File> file) noexcept;

  std::map<Address, std::unique_ptr<File>> files_;  // by parking place
};

}  // namespace aegaeon
