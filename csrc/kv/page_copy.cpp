#include "kv/page_copy.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "transfer/parallel.hpp"

namespace aegaeon {
namespace {

// A thread costs some 20 us to start; below this much for each it does not pay.
constexpr std::size_t kMinBytesPerThread = std::size_t{1} << 20;
// Threads part at multiples of this, so that no two write to one cache line or page of memory.
constexpr std::size_t kCutBytes = 4096;
// Copies of at least this much leave the caches alone (see stream_copy).
constexpr std::size_t kMinStreamedBytes = std::size_t{4} << 20;
constexpr std::size_t kCacheLineBytes = 64;
// Of the next page: enough to hide the latency of jumping there, the hardware fetches the rest.
constexpr std::size_t kPrefetchedBytes = 1024;

struct Piece {
  std::uintptr_t source = 0;
  std::uintptr_t destination = 0;
  std::size_t bytes = 0;
};

void cached_copy(Piece const& piece) {
  std::memcpy(reinterpret_cast<void*>(piece.destination),
              reinterpret_cast<void const*>(piece.source), piece.bytes);
}

#if defined(__x86_64__)

// Stores that do not read the destination's lines first: a third less traffic. memcpy does the
// same, but only for single copies near the size of the last-level cache.
void stream_copy(Piece const& piece, Piece const& next) {
  auto bytes = piece.bytes;
  auto source = reinterpret_cast<char const*>(piece.source);
  auto destination = reinterpret_cast<char*>(piece.destination);
  auto head = std::min(bytes, -piece.destination % kCacheLineBytes);
  std::memcpy(destination, source, head);
  source += head;
  destination += head;
  bytes -= head;
  auto upcoming = reinterpret_cast<char const*>(next.source);
  auto upcoming_end = upcoming + std::min(next.bytes, kPrefetchedBytes);
  for (; bytes >= kCacheLineBytes; bytes -= kCacheLineBytes) {
    if (upcoming < upcoming_end) {
      _mm_prefetch(upcoming, _MM_HINT_T0);
      upcoming += kCacheLineBytes;
    }
    __m128i line[4];
    std::memcpy(line, source, kCacheLineBytes);
    for (int i = 0; i < 4; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(destination) + i, line[i]);
    }
    source += kCacheLineBytes;
    destination += kCacheLineBytes;
  }
  std::memcpy(destination, source, bytes);
}

// Streamed stores become visible to other threads in order only after this.
void finish_streaming() {
  _mm_sfence();
}

#else

void stream_copy(Piece const& piece, Piece const&) {
  cached_copy(piece);
}
void finish_streaming() {}

#endif

// The bytes [begin, end) of all pages in their order; neighbours on both sides are one copy.
class PageCopy {
 public:
  PageCopy(std::span<PlanePair const> planes, std::size_t page_bytes,
           std::span<BlockMove const> moves)
      : planes_(planes),
        moves_(moves),
        page_bytes_(page_bytes),
        total_bytes_(planes.size() * moves.size() * page_bytes),
        // Consecutive blocks of a plane can be neighbours on both sides: then planes come one by
        // one. If not, blocks do, which keeps the writes of a packed block together.
        by_plane_(std::ranges::any_of(planes, [&](auto const& plane) {
          auto page = static_cast<std::int64_t>(page_bytes);
          return plane.source_stride == page && plane.destination_stride == page;
        })) {}

  [[nodiscard]] std::size_t total_bytes() const noexcept { return total_bytes_; }

  // begin < end.
  void run(std::size_t begin, std::size_t end) const {
    bool streamed = total_bytes_ >= kMinStreamedBytes;
    auto copy = [&](Piece const& piece, Piece const& next) {
      if (streamed) {
        stream_copy(piece, next);
      } else {
        cached_copy(piece);
      }
    };
    auto page = page_at(begin / page_bytes_);
    auto pending = piece_of(page, begin % page_bytes_, end - begin);
    for (auto at = begin + pending.bytes; at < end;) {
      page = after(page);
      auto piece = piece_of(page, 0, end - at);
      at += piece.bytes;
      if (piece.source == pending.source + pending.bytes &&
          piece.destination == pending.destination + pending.bytes) {
        pending.bytes += piece.bytes;
      } else {
        copy(pending, piece);
        pending = piece;
      }
    }
    copy(pending, {});
    if (streamed) finish_streaming();
  }

 private:
  struct Page {
    std::size_t plane = 0;
    std::size_t move = 0;
  };

  [[nodiscard]] Page page_at(std::size_t index) const {
    if (by_plane_) return {.plane = index / moves_.size(), .move = index % moves_.size()};
    return {.plane = index % planes_.size(), .move = index / planes_.size()};
  }

  [[nodiscard]] Page after(Page page) const {
    auto& inner = by_plane_ ? page.move : page.plane;
    auto& outer = by_plane_ ? page.plane : page.move;
    if (++inner == (by_plane_ ? moves_.size() : planes_.size())) {
      inner = 0;
      ++outer;
    }
    return page;
  }

  [[nodiscard]] Piece piece_of(Page page, std::size_t inside, std::size_t most_bytes) const {
    auto const& plane = planes_[page.plane];
    auto const& move = moves_[page.move];
    auto address = [&](std::uintptr_t base, std::int64_t stride, std::int64_t block) {
      return base + static_cast<std::uintptr_t>(stride * block) + inside;
    };
    return {.source = address(plane.source, plane.source_stride, move.source),
            .destination = address(plane.destination, plane.destination_stride, move.destination),
            .bytes = std::min(page_bytes_ - inside, most_bytes)};
  }

  std::span<PlanePair const> planes_;
  std::span<BlockMove const> moves_;
  std::size_t page_bytes_;
  std::size_t total_bytes_;
  bool by_plane_;
};

}  // namespace

void copy_pages(std::span<PlanePair const> planes, std::size_t page_bytes,
                std::span<BlockMove const> moves, std::size_t num_threads) {
  PageCopy const pages(planes, page_bytes, moves);
  auto total = pages.total_bytes();
  if (total == 0) return;
  auto shares =
      std::clamp<std::size_t>(total / kMinBytesPerThread, 1, std::max<std::size_t>(num_threads, 1));
  auto begin_of = [&](std::size_t share) {
    return share == shares ? total : total / shares * share / kCutBytes * kCutBytes;
  };
  parallel_for(shares, shares,
               [&](std::size_t share) { pages.run(begin_of(share), begin_of(share + 1)); });
}

}  // namespace aegaeon
