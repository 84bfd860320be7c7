// What torch's pluggable allocator calls. torch opens this module by its path and looks the two
// functions up by name, so nothing here links to torch.
//
// Which pool an allocation belongs to: the one that is active in the calling thread for the device
// (TorchPool::activate). torch calls from the thread that allocates, and only for allocations that
// it has routed to a MemPool with this allocator, which it does per thread too. A free may come
// from any thread, when the pool is long forgotten, or while the process ends: the pieces that
// torch holds keep what they need.
#include <cstddef>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>

#include "error.hpp"
#include "vmm/torch_pool.hpp"

namespace aegaeon {
namespace {

struct Held {
  std::shared_ptr<TorchPool> pool;
  TorchPool::Piece piece;
};

class HeldPieces {
 public:
  void add(Held held) {
    std::lock_guard lock(mutex_);
    auto address = held.piece.address;
    by_address_.emplace(address, std::move(held));
  }

  std::optional<Held> take(Address address) {
    std::lock_guard lock(mutex_);
    auto found = by_address_.extract(address);
    if (found.empty()) return std::nullopt;
    return std::move(found.mapped());
  }

 private:
  std::mutex mutex_;
  std::map<Address, Held> by_address_;
};

// Never destroyed: torch frees what it still caches after the destructors of this module ran.
HeldPieces& held_pieces() {
  static auto* const pieces = new HeldPieces;
  return *pieces;
}

}  // namespace
}  // namespace aegaeon

extern "C" {

// Null for "out of memory", which torch answers by freeing what it caches and asking again, and
// then by its own OutOfMemoryError.
[[gnu::visibility("default")]] void* aegaeon_torch_malloc(std::size_t size, int device,
                                                          void* stream) noexcept try {
  using namespace aegaeon;
  static_cast<void>(stream);  // memory comes mapped and idle; no stream has to wait for it
  auto pool = TorchPool::active(device);
  if (!pool) {
    std::fprintf(stderr,
                 "aegaeon_kernels: torch asks for %zu bytes on device %d in a thread where no "
                 "TorchPool is in use\n",
                 size, device);
    return nullptr;
  }
  auto piece = pool->allocate(size);
  if (!piece) return nullptr;
  auto address = piece->address;
  held_pieces().add({std::move(pool), *std::move(piece)});
  return reinterpret_cast<void*>(address);
} catch (...) {
  return nullptr;
}

[[gnu::visibility("default")]] void aegaeon_torch_free(void* pointer, std::size_t size, int device,
                                                       void* stream) noexcept try {
  using namespace aegaeon;
  if (pointer == nullptr) return;
  auto held = held_pieces().take(reinterpret_cast<Address>(pointer));
  if (!held) {
    std::fprintf(stderr,
                 "aegaeon_kernels: torch frees %zu bytes at %p on device %d, which are not from "
                 "here\n",
                 size, pointer, device);
    return;
  }
  held->pool->free(std::move(held->piece), reinterpret_cast<StreamId>(stream));
} catch (...) {  // only for want of memory; the piece stays taken
}
}
