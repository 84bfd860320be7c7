// HostMemory: bytes in host memory for images to live in. And the ways to get them, best first.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "driver/driver.hpp"
#include "transfer/parallel.hpp"
#include "transfer/registration.hpp"

namespace aegaeon {

// Best first: the ladder is tried from the top.
enum class HostMemoryKind {
  kNuma,      // the driver's, on the device's own node
  kHugetlb,   // reserved huge pages, then locked
  kThp,       // transparent huge pages, then locked
  kShm,       // ordinary shared pages, then locked
  kDriver,    // allocated and locked in one call
  kPageable,  // not locked: copies are staged by the driver, correct but several times slower
};
inline constexpr HostMemoryKind kHostMemoryKinds[] = {
    HostMemoryKind::kNuma, HostMemoryKind::kHugetlb, HostMemoryKind::kThp,
    HostMemoryKind::kShm,  HostMemoryKind::kDriver,  HostMemoryKind::kPageable};

struct HostMemory {
  std::byte* data = nullptr;
  std::size_t size_bytes = 0;
  bool pinned = false;  // locked for DMA; never on the host device, where that means nothing
  // Locked in pieces: no copy may touch two. They are counted from the front of the allocation
  // that this memory is part of. 0: a single piece.
  std::size_t piece_bytes = 0;
  std::size_t offset_bytes = 0;  // of data in that allocation
  std::shared_ptr<void const> keep;

  // How much one copy may take from an offset on.
  [[nodiscard]] std::size_t copyable_bytes(std::size_t offset) const noexcept;
  [[nodiscard]] HostMemory part(std::size_t offset, std::size_t bytes,
                                std::shared_ptr<void const> keep_part) const;
};

struct HostMemoryOptions {
  std::vector<HostMemoryKind> kinds{std::begin(kHostMemoryKinds), std::end(kHostMemoryKinds)};
  std::optional<int> numa_node;  // for the kinds that do not ask the driver
  std::size_t num_threads = default_num_threads();
  std::size_t piece_bytes = Registration::kPieceBytes;
};

// What came of one kind.
struct HostMemoryAttempt {
  HostMemoryKind kind;
  bool worked = false;
  std::string remark;  // why not; or what it is made of
};

// Memory of the first kind that works: zero, with its pages present. Appends every attempt, also
// when it throws: OutOfMemory or DriverError, for none that works.
HostMemory allocate_host_memory(std::shared_ptr<Driver> const& driver, std::size_t bytes,
                                HostMemoryOptions const& options,
                                std::vector<HostMemoryAttempt>* attempts);
// Tries every kind on a small piece.
std::vector<HostMemoryAttempt> probe_host_memory(std::shared_ptr<Driver> const& driver);

// What the driver allocates, as it comes: pages may be absent until they are touched.
HostMemory allocate_by_driver(std::shared_ptr<Driver> driver, std::size_t bytes);

}  // namespace aegaeon
