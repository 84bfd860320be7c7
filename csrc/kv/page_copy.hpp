// Copies pages of many blocks between two sets of planes: what the KV kernel does, on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace aegaeon {

// The page of block `b` is at `source + b * source_stride` and goes to the same of the destination.
struct PlanePair {
  std::uintptr_t source = 0;
  std::int64_t source_stride = 0;
  std::uintptr_t destination = 0;
  std::int64_t destination_stride = 0;
};

struct BlockMove {
  std::int64_t source = 0;
  std::int64_t destination = 0;
};

// Returns when all bytes are there. No destination page may overlap another page: then the order
// does not matter, and the pages are shared out among num_threads threads, this one included.
void copy_pages(std::span<PlanePair const> planes, std::size_t page_bytes,
                std::span<BlockMove const> moves, std::size_t num_threads);

}  // namespace aegaeon
