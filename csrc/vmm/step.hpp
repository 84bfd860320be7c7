// Step: one map or unmap of a plan that is committed as a whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "vmm/slot_map.hpp"

namespace aegaeon {

class Region;

// What a range shows when it has just been mapped.
enum class Contents {
  kZero,     // nothing of another owner: handles that may hold such bytes are zeroed
  kPoison,   // 0xff throughout, a NaN in bf16, fp16, fp32 and fp8-e4m3
  kPreserve  // whatever the handles hold: the caller overwrites all it later reads
};

inline constexpr std::uint8_t kPoisonByte = 0xff;

struct Step {
  enum class Kind { kMap, kUnmap };
  Kind kind = Kind::kMap;
  std::shared_ptr<Region> region;
  std::size_t offset_bytes = 0;
  // None: up to the end of the region, for an unmap whatever is mapped there.
  std::optional<std::size_t> size_bytes;
  Contents contents = Contents::kZero;  // of a map, as is the next
  bool read_only = false;
};

// A step whose range has been checked.
struct PlannedStep {
  Step::Kind kind;
  std::shared_ptr<Region> region;
  Range range;
  std::size_t bytes;  // an unmap without a size takes what is there
  Contents contents;
  bool read_only;
};

}  // namespace aegaeon
