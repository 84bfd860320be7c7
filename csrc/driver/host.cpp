// A device in this process's own memory, with CUDA's virtual memory rules and result codes.
//
// Page faults, not system calls, are what mapping costs on a CPU, so the page tables of a handle
// are made once and then moved: set-access moves them with mremap from the handle's parking place
// (host_memory.hpp) to the target address, unmap moves them back, in one call each for handles that
// are neighbours in both places. Both sides are aligned to the page directory (2 MiB), so a move is
// a few pointer swaps: 512 MiB in 0.15 ms, against 170 ms for unmapping and faulting again. Where
// the kernel cannot, page tables stay parked, and a mapping is a second view of the same pages,
// which faults them in again.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>

#include "driver/driver.hpp"
#include "driver/host_memory.hpp"
#include "driver/host_streams.hpp"

namespace aegaeon {
namespace {

int protection(Access access) noexcept {
  switch (access) {
    case Access::kNone:
      return PROT_NONE;
    case Access::kRead:
      return PROT_READ;
    case Access::kReadWrite:
      return PROT_READ | PROT_WRITE;
  }
  return PROT_NONE;
}

struct Memory {
  HostMemory::Piece piece;
  bool parked = true;  // whether the page tables are at the parking place
  bool released = false;
  std::size_t num_mappings = 0;
  bool charged = true;  // against our capacity
};

struct Mapped {
  std::size_t bytes = 0;
  Memory* memory = nullptr;
  MemHandle handle = 0;
  Access access = Access::kNone;
  bool present = false;            // the target range shows the memory (from the first set-access)
  bool holds_page_tables = false;  // they were moved here from the parking place

  [[nodiscard]] bool is_followed_by(Mapped const& next) const noexcept {
    return memory->piece.is_followed_by(next.memory->piece) && present == next.present &&
           access == next.access && holds_page_tables == next.holds_page_tables &&
           memory->parked == next.memory->parked;
  }
};

class HostDriver final : public Driver {
 public:
  HostDriver(std::size_t capacity_bytes, bool move_page_tables, std::size_t granularity_bytes)
      : capacity_(capacity_bytes),
        granularity_(granularity_bytes),
        can_move_(move_page_tables ? probe_page_table_moves() : PageTableMoves{}),
        process_(getpid()) {}

  ~HostDriver() override {
    if (getpid() != process_) {
      // A child of fork() has no workers: joining them, or destroying what they wait on, would
      // never return. Its copy is left to the end of the process.
      static_cast<void>(new auto(std::move(streams_)));
      static_cast<void>(new auto(std::move(events_)));
    }
    streams_.clear();  // joins the workers, which may still be copying
    for (auto const& [address, bytes] : reservations_) munmap(pointer(address), bytes);
    for (auto const& [memory, bytes] : host_memory_) munmap(memory, bytes);
  }

  std::string name() const override { return "host"; }
  DeviceKind kind() const noexcept override { return DeviceKind::kHost; }
  int device_index() const noexcept override { return 0; }
  std::size_t granularity_bytes() const noexcept override { return granularity_; }

  std::string describe(Result code) const override {
    switch (code) {
      case kSuccess:
        return "no error";
      case kInvalidValue:
        return "invalid argument";
      case kDriverOutOfMemory:
        return "out of memory";
      case kInvalidHandle:
        return "invalid resource handle";
      case kNotReady:
        return "not ready";
      case kHostMemoryAlreadyRegistered:
        return "part or all of the memory is registered already";
      case kHostMemoryNotRegistered:
        return "the memory is not registered";
      case kNotSupported:
        return "not supported";
      default:
        return "driver error";
    }
  }

  Result memory_info(MemoryInfo* info) noexcept override {
    std::lock_guard lock(mutex_);
    *info = {.free_bytes = capacity_ - used_, .total_bytes = capacity_};
    return kSuccess;
  }

  Result mem_create(MemHandle* handle, std::size_t bytes, bool exportable) noexcept override {
    std::lock_guard lock(mutex_);
    if (bytes == 0 || bytes % granularity_ != 0) return kInvalidValue;
    if (bytes > capacity_ - used_) return kDriverOutOfMemory;
    auto piece = files_.create(bytes, exportable);
    if (piece.file == nullptr) return kDriverOutOfMemory;
    *handle = next_id_++;
    memories_.emplace(*handle, Memory{.piece = piece});
    used_ += bytes;
    return kSuccess;
  }

  Result mem_export(int* fd, MemHandle handle) noexcept override {
    std::lock_guard lock(mutex_);
    auto found = memories_.find(handle);
    if (found == memories_.end() || found->second.released) return kInvalidValue;
    auto const& file = *found->second.piece.file;
    if (file.fd < 0 || file.inode == 0) return kInvalidValue;
    int exported = fcntl(file.fd, F_DUPFD_CLOEXEC, 0);
    if (exported < 0) return kDriverOutOfMemory;
    *fd = exported;
    return kSuccess;
  }

  Result mem_import(MemHandle* handle, int fd, std::size_t bytes) noexcept override {
    std::lock_guard lock(mutex_);
    if (bytes == 0 || bytes % granularity_ != 0) return kInvalidValue;
    Result why_not = kSuccess;
    auto piece = files_.import(fd, bytes, &why_not);
    if (piece.file == nullptr) return why_not;
    *handle = next_id_++;
    memories_.emplace(*handle, Memory{.piece = piece, .charged = false});
    return kSuccess;
  }

  Result mem_release(MemHandle handle) noexcept override {
    std::lock_guard lock(mutex_);
    auto found = memories_.find(handle);
    if (found == memories_.end() || found->second.released) return kInvalidValue;
    found->second.released = true;
    reap(found);
    return kSuccess;
  }

  Result address_reserve(Address* address, std::size_t bytes,
                         std::size_t alignment) noexcept override {
    std::lock_guard lock(mutex_);
    if (bytes == 0 || bytes % granularity_ != 0) return kInvalidValue;
    if ((alignment & (alignment - 1)) != 0) return kInvalidValue;
    Address begin = reserve_aligned(bytes, std::max(alignment, granularity_));
    if (begin == 0) return kDriverOutOfMemory;
    reservations_.emplace(begin, bytes);
    *address = begin;
    return kSuccess;
  }

  Result address_free(Address address, std::size_t bytes) noexcept override {
    std::lock_guard lock(mutex_);
    auto found = reservations_.find(address);
    if (found == reservations_.end() || found->second != bytes) return kInvalidValue;
    auto mapped = mapped_.lower_bound(address);
    if (mapped != mapped_.end() && mapped->first < address + bytes) return kInvalidValue;
    munmap(pointer(address), bytes);
    reservations_.erase(found);
    return kSuccess;
  }

  Result mem_map(Address address, std::size_t bytes, std::size_t offset,
                 MemHandle handle) noexcept override {
    std::lock_guard lock(mutex_);
    auto found = memories_.find(handle);
    if (found == memories_.end() || found->second.released) return kInvalidValue;
    if (offset != 0 || bytes != found->second.piece.bytes) return kInvalidValue;
    if (address % granularity_ != 0 || !reserved(address, bytes)) return kInvalidValue;
    auto next = mapped_.lower_bound(address);
    if (next != mapped_.end() && next->first < address + bytes) return kInvalidValue;
    if (next != mapped_.begin()) {
      auto previous = std::prev(next);
      if (previous->first + previous->second.bytes > address) return kInvalidValue;
    }
    mapped_.emplace_hint(next, address,
                         Mapped{.bytes = bytes, .memory = &found->second, .handle = handle});
    ++found->second.num_mappings;
    return kSuccess;
  }

  Result mem_set_access(Address address, std::size_t bytes, Access access) noexcept override {
    std::lock_guard lock(mutex_);
    auto run = whole_mappings(address, bytes);
    if (run.first == run.second) return kInvalidValue;
    bool same_protection = true;
    for (auto it = run.first; it != run.second;) {
      auto next = std::next(it);
      if (access != Access::kNone && !it->second.present) {
        next = end_of_neighbours(it, run.second);
        if (!show(it, next)) return kDriverOutOfMemory;
      }
      for (; it != next; ++it) same_protection = same_protection && it->second.access == access;
    }
    if (!same_protection && mprotect(pointer(address), bytes, protection(access)) != 0) {
      return kDriverOutOfMemory;
    }
    for (auto it = run.first; it != run.second; ++it) it->second.access = access;
    return kSuccess;
  }

  Result mem_unmap(Address address, std::size_t bytes) noexcept override {
    std::lock_guard lock(mutex_);
    auto run = whole_mappings(address, bytes);
    if (run.first == run.second) return kInvalidValue;
    bool any_present = false;
    for (auto it = run.first; it != run.second;) {
      any_present = any_present || it->second.present;
      auto next = std::next(it);
      if (it->second.holds_page_tables) {
        next = end_of_neighbours(it, run.second);
        park(it, next);
      }
      it = next;
    }
    // Not mprotect: this drops the range's hold on the memory, and merges with its neighbours.
    if (any_present && !make_inaccessible(address, bytes)) return kDriverOutOfMemory;
    for (auto it = run.first; it != run.second; ++it) {
      --it->second.memory->num_mappings;
      reap(memories_.find(it->second.handle));
    }
    mapped_.erase(run.first, run.second);
    return kSuccess;
  }

  Result host_alloc(void** memory, std::size_t bytes) noexcept override {
    if (bytes == 0) return kInvalidValue;
    void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return kDriverOutOfMemory;
    madvise(begin, bytes, MADV_HUGEPAGE);  // fewer faults while it is filled; refusal is harmless
    std::lock_guard lock(mutex_);
    host_memory_.emplace(begin, bytes);
    *memory = begin;
    return kSuccess;
  }

  Result host_free(void* memory) noexcept override {
    std::lock_guard lock(mutex_);
    auto found = host_memory_.find(memory);
    if (found == host_memory_.end()) return kInvalidValue;
    munmap(memory, found->second);
    host_memory_.erase(found);
    return kSuccess;
  }

  Result host_alloc_numa(void** /*memory*/, std::size_t /*bytes*/) noexcept override {
    return kNotSupported;
  }

  Result host_register(void* memory, std::size_t bytes) noexcept override {
    Address begin = address_of(memory);
    if (begin == 0 || bytes == 0 || begin % page_bytes() != 0) return kInvalidValue;
    std::lock_guard lock(mutex_);
    auto next = registrations_.lower_bound(begin);
    if (next != registrations_.end() && next->first < begin + bytes) {
      return kHostMemoryAlreadyRegistered;
    }
    if (next != registrations_.begin()) {
      auto const& [before, size] = *std::prev(next);
      if (before + size > begin) return kHostMemoryAlreadyRegistered;
    }
    registrations_.emplace_hint(next, begin, bytes);
    return kSuccess;
  }

  Result host_unregister(void* memory) noexcept override {
    std::lock_guard lock(mutex_);
    return registrations_.erase(address_of(memory)) == 1 ? kSuccess : kHostMemoryNotRegistered;
  }

  Result stream_create(StreamId* stream) noexcept override {
    try {
      auto created = std::make_shared<HostStream>();
      std::lock_guard lock(mutex_);
      *stream = next_id_++;
      streams_.emplace(*stream, std::move(created));
      return kSuccess;
    } catch (std::exception const&) {  // no thread, or no memory for one
      return kDriverOutOfMemory;
    }
  }

  Result stream_destroy(StreamId stream) noexcept override {
    std::shared_ptr<HostStream> gone;  // joined outside the lock: it may have work left
    std::lock_guard lock(mutex_);
    auto found = streams_.find(stream);
    if (found == streams_.end()) return kInvalidHandle;
    gone = std::move(found->second);
    streams_.erase(found);
    return kSuccess;
  }

  Result stream_synchronize(StreamId stream) noexcept override {
    auto found = find(streams_, stream);
    if (!found) return kInvalidHandle;
    found->synchronize();
    return kSuccess;
  }

  Result stream_wait_event(StreamId stream, EventId event) noexcept override {
    auto found = find(streams_, stream);
    auto awaited = find(events_, event);
    if (!found || !awaited) return kInvalidHandle;
    found->wait(std::move(awaited));
    return kSuccess;
  }

  Result stream_is_capturing(bool* capturing, StreamId stream) noexcept override {
    if (!find(streams_, stream)) return kInvalidHandle;
    *capturing = false;  // there are no graphs here
    return kSuccess;
  }

  Result memcpy_h2d_async(Address destination, void const* source, std::size_t bytes,
                          StreamId stream) noexcept override {
    auto found = find(streams_, stream);
    if (!found) return kInvalidHandle;
    if (!accessible(destination, bytes, Access::kReadWrite)) return kInvalidValue;
    found->copy(pointer(destination), source, bytes);
    return kSuccess;
  }

  Result memcpy_d2h_async(void* destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override {
    auto found = find(streams_, stream);
    if (!found) return kInvalidHandle;
    if (!accessible(source, bytes, Access::kRead)) return kInvalidValue;
    found->copy(destination, pointer(source), bytes);
    return kSuccess;
  }

  Result memcpy_d2d_async(Address destination, Address source, std::size_t bytes,
                          StreamId stream) noexcept override {
    auto found = find(streams_, stream);
    if (!found) return kInvalidHandle;
    if (!accessible(source, bytes, Access::kRead) ||
        !accessible(destination, bytes, Access::kReadWrite)) {
      return kInvalidValue;
    }
    found->copy(pointer(destination), pointer(source), bytes);
    return kSuccess;
  }

  Result memset_async(Address destination, std::uint8_t value, std::size_t bytes,
                      StreamId stream) noexcept override {
    auto found = find(streams_, stream);
    if (!found) return kInvalidHandle;
    if (!accessible(destination, bytes, Access::kReadWrite)) return kInvalidValue;
    found->fill(pointer(destination), value, bytes);
    return kSuccess;
  }

  Result event_create(EventId* event) noexcept override {
    std::lock_guard lock(mutex_);
    *event = next_id_++;
    events_.emplace(*event, std::make_shared<HostEvent>());
    return kSuccess;
  }

  Result event_destroy(EventId event) noexcept override {
    std::lock_guard lock(mutex_);
    return events_.erase(event) == 1 ? kSuccess : kInvalidHandle;
  }

  Result event_record(EventId event, StreamId stream) noexcept override {
    auto recorded = find(events_, event);
    auto found = find(streams_, stream);
    if (!recorded || !found) return kInvalidHandle;
    found->record(std::move(recorded));
    return kSuccess;
  }

  Result event_query(EventId event) noexcept override {
    auto found = find(events_, event);
    if (!found) return kInvalidHandle;
    return found->reached(found->last_record()) ? kSuccess : kNotReady;
  }

  Result event_synchronize(EventId event) noexcept override {
    auto found = find(events_, event);
    if (!found) return kInvalidHandle;
    found->wait(found->last_record());
    return kSuccess;
  }

 private:
  using Mappings = std::map<Address, Mapped>;

  template <typename Object>
  std::shared_ptr<Object> find(std::unordered_map<std::uint64_t, std::shared_ptr<Object>> const& in,
                               std::uint64_t id) const {
    std::lock_guard lock(mutex_);
    auto found = in.find(id);
    return found == in.end() ? nullptr : found->second;
  }

  bool reserved(Address address, std::size_t bytes) const {
    auto next = reservations_.upper_bound(address);
    if (next == reservations_.begin()) return false;
    auto const& [begin, size] = *std::prev(next);
    return address + bytes <= begin + size && address + bytes > address;
  }

  // The mappings that fill the range exactly, or an empty run when a mapping is cut or missing.
  std::pair<Mappings::iterator, Mappings::iterator> whole_mappings(Address address,
                                                                   std::size_t bytes) {
    auto begin = mapped_.find(address);
    auto end = begin;
    Address reached = address;
    while (end != mapped_.end() && end->first == reached && reached < address + bytes) {
      reached += end->second.bytes;
      ++end;
    }
    if (reached != address + bytes) return {mapped_.end(), mapped_.end()};
    return {begin, end};
  }

  bool accessible(Address address, std::size_t bytes, Access needed) const {
    std::lock_guard lock(mutex_);
    auto it = mapped_.upper_bound(address);
    if (it == mapped_.begin()) return false;
    --it;
    Address reached = it->first;
    for (; it != mapped_.end() && it->first == reached; ++it) {
      auto const& mapped = it->second;
      reached += mapped.bytes;
      if (reached <= address) return false;
      if (mapped.access == Access::kNone) return false;
      if (needed == Access::kReadWrite && mapped.access != needed) return false;
      if (reached >= address + bytes) return true;
    }
    return false;
  }

  // Of the mappings that one call of the kernel can treat as the first one: neighbours in memory
  // too, and in the same state.
  Mappings::iterator end_of_neighbours(Mappings::iterator begin, Mappings::iterator end) const {
    auto last = begin;
    auto next = std::next(begin);
    while (can_move_.runs && next != end && last->second.is_followed_by(next->second)) {
      last = next++;
    }
    return next;
  }

  // Makes the memory visible at its target, readable and writable.
  bool show(Mappings::iterator begin, Mappings::iterator end) noexcept {
    auto const& memory = *begin->second.memory;
    auto parking = memory.piece.parking;
    auto bytes = bytes_of(begin, end);
    bool move = memory.parked && can_move_.pieces && move_page_tables(parking, begin->first, bytes);
    if (!move && !duplicate_view(parking, begin->first, bytes)) return false;
    for (auto it = begin; it != end; ++it) {
      it->second.present = true;
      it->second.access = Access::kReadWrite;
      it->second.holds_page_tables = move;
      if (move) it->second.memory->parked = false;
    }
    return true;
  }

  void park(Mappings::iterator begin, Mappings::iterator end) noexcept {
    auto parking = begin->second.memory->piece.parking;
    auto bytes = bytes_of(begin, end);
    // Failure costs page faults, not data.
    if (!move_page_tables(begin->first, parking, bytes)) {
      duplicate_view(begin->first, parking, bytes);
    }
    if (begin->second.access != Access::kReadWrite) {
      mprotect(pointer(parking), bytes, PROT_READ | PROT_WRITE);
    }
    for (auto it = begin; it != end; ++it) {
      it->second.memory->parked = true;
      it->second.holds_page_tables = false;
    }
  }

  static std::size_t bytes_of(Mappings::iterator begin, Mappings::iterator end) noexcept {
    auto const& last = *std::prev(end);
    return last.first + last.second.bytes - begin->first;
  }

  void reap(std::unordered_map<MemHandle, Memory>::iterator memory) noexcept {
    if (!memory->second.released || memory->second.num_mappings != 0) return;
    Memory gone = memory->second;
    auto inode = gone.piece.file->inode;
    files_.destroy(gone.piece);
    memories_.erase(memory);
    if (!gone.charged) return;
    // Memory that we imported from ourselves is there, and paid for, until its last handle goes.
    auto heir = std::find_if(memories_.begin(), memories_.end(), [&](auto const& other) {
      return inode != 0 && other.second.piece.file->inode == inode;
    });
    if (heir != memories_.end()) {
      heir->second.charged = true;
    } else {
      used_ -= gone.piece.bytes;
    }
  }

  std::size_t const capacity_;
  std::size_t const granularity_;
  PageTableMoves const can_move_;
  pid_t const process_;
  mutable std::mutex mutex_;  // guards all that follows
  std::size_t used_ = 0;
  std::uint64_t next_id_ = 1;
  HostMemory files_;
  std::unordered_map<MemHandle, Memory> memories_;  // elements keep their place; Mapped points here
  std::map<Address, std::size_t> reservations_;
  Mappings mapped_;
  std::unordered_map<void*, std::size_t> host_memory_;
  std::map<Address, std::size_t> registrations_;
  std::unordered_map<StreamId, std::shared_ptr<HostStream>> streams_;
  std::unordered_map<EventId, std::shared_ptr<HostEvent>> events_;
};

}  // namespace

std::shared_ptr<Driver> make_host_driver(std::size_t capacity_bytes, bool move_page_tables) {
  return make_host_driver(capacity_bytes, move_page_tables, kHostGranularity);
}

std::shared_ptr<Driver> make_host_driver(std::size_t capacity_bytes, bool move_page_tables,
                                         std::size_t granularity_bytes) {
  return std::make_shared<HostDriver>(capacity_bytes, move_page_tables, granularity_bytes);
}

}  // namespace aegaeon
