// How the host device copies bytes.
#pragma once

#include <cstddef>

namespace aegaeon {

// From here on a copy bypasses the caches on its way out (streaming stores): the destination is not
// read first, which memmove does up to sizes beyond any chunk of ours. Measured (x86-64 with 32 MiB
// of last-level cache, chunks of 8 MiB, medians of ratios to memmove): the copy takes 0.57 of the
// time; reading the destination afterwards 1.0 of it where that exceeds the cache (256 MiB), 1.24
// for 8 MiB, 1.25 for 1 MiB; both together 0.70, 0.79 and 0.85. Below, a reader loses what the copy
// gains. Wider stores (AVX2) gain nothing over 16 bytes.
inline constexpr std::size_t kStreamingBytes = std::size_t{1} << 20;

// As memmove: the ranges may overlap. Other threads see the bytes after any release operation.
void copy_bytes(void* destination, void const* source, std::size_t bytes) noexcept;

}  // namespace aegaeon
