// Shortage: what is missing for a plan, who has it, and what would have to go.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace aegaeon {

using Holder = std::pair<std::string, std::string>;  // owner, tag

enum class ShortageReason { kCapacity, kOwnerMaximum, kOtherMinima };

struct Evictable {
  std::string owner;
  std::string tag;
  std::size_t bytes = 0;
};

struct Shortage {
  ShortageReason reason = ShortageReason::kCapacity;
  std::string owner;                // of the first map that does not fit
  std::string tag;                  // of the same
  std::size_t requested_bytes = 0;  // by all maps of the plan
  std::size_t missing_bytes = 0;    // this much more would let all of the plan through
  std::size_t free_bytes = 0;       // before the plan
  std::map<Holder, std::size_t> holders;
  // Enough to cover missing_bytes, or empty.
  std::vector<Evictable> evictable;
  std::string why_none;  // of an empty `evictable`
  std::string message;
};

}  // namespace aegaeon
