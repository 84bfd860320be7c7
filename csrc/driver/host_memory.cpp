#include "driver/host_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

namespace aegaeon {
namespace {

constexpr std::size_t kSharedFileBytes = std::size_t{1}
                                         << 30;  // of addresses: memory as it is used
constexpr std::size_t kMaxSharingBytes = kSharedFileBytes / 8;
// What an importer maps must not shrink beneath it.
constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW;

// A mapping of the whole file; 0 when there is no room for it.
Address map_parking(int fd, std::size_t bytes) noexcept {
  Address parking = reserve_aligned(bytes, kHostGranularity);
  if (parking != 0 && mmap(pointer(parking), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                           fd, 0) == MAP_FAILED) {
    munmap(pointer(parking), bytes);
    parking = 0;
  }
  return parking;
}

}  // namespace

std::size_t page_bytes() noexcept {
  return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

bool make_inaccessible(Address address, std::size_t bytes) noexcept {
  return mmap(pointer(address), bytes, PROT_NONE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
}

Address reserve_aligned(std::size_t bytes, std::size_t alignment) noexcept {
  void* raw = mmap(nullptr, bytes + alignment, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return 0;
  Address begin = address_of(raw);
  Address aligned = (begin + alignment - 1) / alignment * alignment;
  if (aligned > begin) munmap(raw, aligned - begin);
  munmap(pointer(aligned + bytes), begin + alignment - aligned);
  return aligned;
}

bool move_page_tables(Address from, Address to, std::size_t bytes) noexcept {
  // Fixed, also because glibc 2.36 passes no address, but garbage, without MREMAP_FIXED.
  return mremap(pointer(from), bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
                pointer(to)) == pointer(to);
}

bool duplicate_view(Address from, Address to, std::size_t bytes) noexcept {
  // An old size of 0 duplicates a shared mapping.
  return mremap(pointer(from), 0, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, pointer(to)) == pointer(to);
}

PageTableMoves probe_page_table_moves() noexcept {
  PageTableMoves moves;
  int fd = memfd_create("aegaeon-probe", MFD_CLOEXEC);
  if (fd < 0) return moves;
  std::size_t page = page_bytes();
  if (ftruncate(fd, static_cast<off_t>(2 * page)) == 0) {
    Address parking = map_parking(fd, 2 * page);
    Address target = reserve_aligned(2 * page, page);
    if (parking != 0 && target != 0) {
      moves.pieces = move_page_tables(parking, target, page) &&
                     move_page_tables(parking + page, target + page, page);
      moves.runs = moves.pieces && move_page_tables(target, parking, 2 * page) &&
                   move_page_tables(parking + page, target + page, page) &&
                   move_page_tables(target + page, parking + page, page) &&
                   move_page_tables(parking, target, 2 * page);
    }
    if (parking != 0) munmap(pointer(parking), 2 * page);
    if (target != 0) munmap(pointer(target), 2 * page);
  }
  close(fd);
  return moves;
}

HostMemory::File::~File() {
  if (parking != 0) munmap(pointer(parking), bytes);
  if (fd >= 0) close(fd);
}

HostMemory::File* HostMemory::keep(std::unique_ptr<File> file) noexcept {
  auto* kept = file.get();
  files_.emplace(kept->parking, std::move(file));
  return kept;
}

HostMemory::File* HostMemory::open(std::size_t bytes) noexcept {
  auto file = std::make_unique<File>();
  file->bytes = bytes;
  file->fd = memfd_create("aegaeon-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (file->fd < 0 || ftruncate(file->fd, static_cast<off_t>(bytes)) != 0 ||
      fcntl(file->fd, F_ADD_SEALS, kSizeSeals) != 0) {
    return nullptr;
  }
  file->parking = map_parking(file->fd, bytes);
  return file->parking == 0 ? nullptr : keep(std::move(file));
}

HostMemory::Piece HostMemory::take(File& file, std::size_t bytes) noexcept {
  for (auto hole = file.free.begin(); hole != file.free.end(); ++hole) {
    auto [offset, size] = *hole;
    if (size < bytes) continue;
    file.free.erase(hole);
    if (size > bytes) file.free.emplace(offset + bytes, size - bytes);
    return {.file = &file, .parking = file.parking + offset, .bytes = bytes};
  }
  return {};
}

HostMemory::Piece HostMemory::create(std::size_t bytes, bool exportable) noexcept {
  if (exportable || bytes > kMaxSharingBytes) {
    auto* file = open(bytes);
    if (file == nullptr) return {};
    struct stat status{};
    if (exportable) {
      fstat(file->fd, &status);
      file->inode = status.st_ino;
    } else {
      // The mapping keeps the memory; too many open files would meet the process's limit.
      close(std::exchange(file->fd, -1));
    }
    return {.file = file, .parking = file->parking, .bytes = bytes};
  }
  for (auto& [parking, file] : files_) {
    if (Piece piece = take(*file, bytes); piece.file != nullptr) return piece;
  }
  auto* file = open(kSharedFileBytes);
  if (file == nullptr) return {};
  file->free.emplace(0, kSharedFileBytes);
  return take(*file, bytes);
}

HostMemory::Piece HostMemory::import(int fd, std::size_t bytes, Result* why_not) noexcept {
  struct stat status{};
  int seals = fcntl(fd, F_GET_SEALS);
  bool sealed = seals >= 0 && (seals & kSizeSeals) == kSizeSeals;
  if (!sealed || fstat(fd, &status) != 0 || status.st_size != static_cast<off_t>(bytes)) {
    *why_not = kInvalidValue;
    return {};
  }
  auto file = std::make_unique<File>();
  file->bytes = bytes;
  file->inode = status.st_ino;
  file->parking = map_parking(fd, bytes);
  if (file->parking == 0) {
    *why_not = kDriverOutOfMemory;
    return {};
  }
  auto* kept = keep(std::move(file));
  return {.file = kept, .parking = kept->parking, .bytes = bytes};
}

void HostMemory::destroy(Piece const& piece) noexcept {
  auto& file = *piece.file;
  bool shared = file.bytes != piece.bytes;
  if (shared) {
    std::size_t offset = piece.parking - file.parking;
    if (fallocate(file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                  static_cast<off_t>(piece.bytes)) != 0) {
      return;  // its bytes are still there: not for the next one to see
    }
    auto next = file.free.emplace(offset, piece.bytes).first;
    auto end = std::next(next);
    if (end != file.free.end() && end->first == offset + piece.bytes) {
      next->second += end->second;
      file.free.erase(end);
    }
    if (next != file.free.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += next->second;
        file.free.erase(next);
      }
    }
    if (file.free.begin()->second != file.bytes) return;
  }
  files_.erase(file.parking);
}

}  // namespace aegaeon
