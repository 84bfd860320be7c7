// SharedHandle: memory that crosses a process border, as a descriptor and its place in a region.
#pragma once

#include <cstddef>

namespace aegaeon {

struct SharedHandle {
  int fd = -1;
  std::size_t offset_bytes = 0;
  std::size_t size_bytes = 0;
};

}  // namespace aegaeon
