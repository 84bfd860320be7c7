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
// How far reads run ahead of copying, over the ends of pages. Blocks lie anywhere: the hardware's
// own prefetching starts anew at every page, and it is there that a copy would wait.
constexpr std::size_t kLinesAhead = 32;

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
// same, but only for single copies near the size of the last-level cache. `fetch_ahead` is called
// once for about every line.
template <typename FetchAhead>
void stream_copy(Piece const& piece, FetchAhead&& fetch_ahead) {
  auto bytes = piece.bytes;
  auto source = reinterpret_cast<char const*>(piece.source);
  auto destination = reinterpret_cast<char*>(piece.destination);
  if (auto head = std::min(bytes, -piece.destination % kCacheLineBytes); head != 0) {
    fetch_ahead();
    std::memcpy(destination, source, head);
    source += head;
    destination += head;
    bytes -= head;
  }
  for (; bytes >= kCacheLineBytes; bytes -= kCacheLineBytes) {
    fetch_ahead();
    __m128i line[4];
    std::memcpy(line, source, kCacheLineBytes);
    for (int i = 0; i < 4; ++i) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(destination) + i, line[i]);
    }
    source += kCacheLineBytes;
    destination += kCacheLineBytes;
  }
  if (bytes != 0) {
    fetch_ahead();
    std::memcpy(destination, source, bytes);
  }
}

void fetch(std::uintptr_t address) {
  _mm_prefetch(reinterpret_cast<char const*>(address), _MM_HINT_NTA);
}

// Streamed stores become visible to other threads in order only after this.
void finish_streaming() {
  _mm_sfence();
}

#else

template <typename FetchAhead>
void stream_copy(Piece const& piece, FetchAhead&&) {
  cached_copy(piece);
}
void fetch(std::uintptr_t) {}
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
    if (total_bytes_ < kMinStreamedBytes) {
      for_each_piece(begin, end, cached_copy);
      return;
    }
    SourceLines ahead(*this, begin, end);
    for (std::size_t i = 0; i < kLinesAhead; ++i) ahead.fetch_next();
    for_each_piece(begin, end,
                   [&](Piece const& piece) { stream_copy(piece, [&] { ahead.fetch_next(); }); });
    finish_streaming();
  }

 private:
  struct Page {
    std::size_t plane = 0;
    std::size_t move = 0;
  };

  // The lines of the sources in the order in which they are copied.
  class SourceLines {
   public:
    SourceLines(PageCopy const& pages, std::size_t begin, std::size_t end)
        : pages_(pages), page_(pages.page_at(begin / pages.page_bytes_)), left_(end - begin) {
      enter(begin % pages.page_bytes_);
    }

    // Nothing, behind the last one.
    void fetch_next() {
      if (at_ >= page_end_) {
        if (left_ == 0) return;
        page_ = pages_.after(page_);
        enter(0);
      }
      fetch(at_);
      at_ += kCacheLineBytes;
    }

   private:
    void enter(std::size_t inside) {
      auto piece = pages_.piece_of(page_, inside, left_);
      at_ = piece.source;
      page_end_ = piece.source + piece.bytes;
      left_ -= piece.bytes;
    }

    PageCopy const& pages_;
    Page page_;
    std::size_t left_;  // bytes of the pages after this one
    std::uintptr_t at_ = 0;
    std::uintptr_t page_end_ = 0;
  };

  template <typename Copy>
  void for_each_piece(std::size_t begin, std::size_t end, Copy&& copy) const {
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
        copy(pending);
        pending = piece;
      }
    }
    copy(pending);
  }

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
