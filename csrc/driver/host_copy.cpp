#include "driver/host_copy.hpp"

#include <cstdint>
#include <cstring>

// Streaming stores are invisible to the thread sanitizer; memmove is not.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define AEGAEON_STREAMING_STORES
#include <emmintrin.h>
#endif

namespace aegaeon {
namespace {

#ifdef AEGAEON_STREAMING_STORES

constexpr std::size_t kLine = 64;  // of the cache; a line is written as a whole or not at all
constexpr std::size_t kPrefetchBytes = 512;  // ahead of the loads

// Both counted in lines; the destination starts at one.
void stream_lines(std::byte* destination, std::byte const* source, std::size_t bytes) noexcept {
  for (std::size_t at = 0; at < bytes; at += kLine) {
    // Past the end of the source it has no effect.
    _mm_prefetch(reinterpret_cast<char const*>(source + at + kPrefetchBytes), _MM_HINT_NTA);
    auto const* from = reinterpret_cast<__m128i const*>(source + at);
    auto* to = reinterpret_cast<__m128i*>(destination + at);
    __m128i a = _mm_loadu_si128(from);
    __m128i b = _mm_loadu_si128(from + 1);
    __m128i c = _mm_loadu_si128(from + 2);
    __m128i d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  _mm_sfence();  // streaming stores are not ordered by a release store
}

bool overlap(std::byte const* a, std::byte const* b, std::size_t bytes) noexcept {
  auto first = reinterpret_cast<std::uintptr_t>(a);
  auto second = reinterpret_cast<std::uintptr_t>(b);
  return first < second + bytes && second < first + bytes;
}

#endif

}  // namespace

void copy_bytes(void* destination, void const* source, std::size_t bytes) noexcept {
#ifdef AEGAEON_STREAMING_STORES
  auto* to = static_cast<std::byte*>(destination);
  auto const* from = static_cast<std::byte const*>(source);
  if (bytes >= kStreamingBytes && !overlap(to, from, bytes)) {
    std::size_t head = -reinterpret_cast<std::uintptr_t>(to) % kLine;
    std::size_t body = (bytes - head) / kLine * kLine;
    std::memcpy(to, from, head);
    stream_lines(to + head, from + head, body);
    std::memcpy(to + head + body, from + head + body, bytes - head - body);
    return;
  }
#endif
  std::memmove(destination, source, bytes);
}

}  // namespace aegaeon
