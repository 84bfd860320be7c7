// TransferOrder: which bytes a transfer moves, and in what order they are needed.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "vmm/arena.hpp"

namespace aegaeon {

enum class Direction { kLoad, kStore };  // host to device, device to host
inline constexpr std::size_t kNumDirections = 2;

// One run of bytes of a transfer: where it lies in the region and where in the image.
struct Piece {
  std::size_t region_offset_bytes = 0;
  std::size_t image_offset_bytes = 0;
  std::size_t size_bytes = 0;
};

class TransferOrder {
 public:
  // Pieces in the order in which they are needed. A layer is a run of consecutive pieces;
  // layer_ends says, for each layer, how many pieces end with it (none given: one piece each).
  // Throws std::invalid_argument for pieces that are empty, lie outside or overlap where they are
  // written, and for layers that are empty or leave pieces out.
  TransferOrder(Direction direction, std::vector<Piece> pieces,
                std::optional<std::vector<std::size_t>> layer_ends, std::size_t image_bytes,
                std::size_t region_bytes);

  [[nodiscard]] std::size_t total_bytes() const noexcept { return ends_.back(); }
  [[nodiscard]] std::size_t num_layers() const noexcept { return layer_ends_.size(); }
  [[nodiscard]] std::vector<Range> in_region() const;

  // How many bytes, from the front of the order, bring that layer, or that range of where they are
  // written, in full. Throws std::invalid_argument for what the order does not bring.
  [[nodiscard]] std::size_t bytes_through_layer(std::size_t layer_idx) const;
  [[nodiscard]] std::size_t bytes_through(Range const& range) const;
  // Where the first so many bytes of the order are written: by offset, those that touch joined.
  [[nodiscard]] std::vector<Range> ranges_within(std::size_t num_bytes) const;

  // A place in the order.
  struct Cursor {
    std::size_t piece_idx = 0;
    std::size_t piece_bytes = 0;  // of that piece, already taken
    std::size_t total_bytes = 0;  // of all, already taken
  };
  [[nodiscard]] bool at_end(Cursor const& cursor) const noexcept {
    return cursor.piece_idx == pieces_.size();
  }
  // The next copies, of at most chunk_bytes together: consecutive pieces share a chunk, so that
  // many small ones cost one event and one hand-over between threads; those that touch on both
  // sides become one copy.
  std::vector<Piece> take(Cursor& cursor, std::size_t chunk_bytes) const;

 private:
  // Of the side that is written.
  [[nodiscard]] std::size_t offset_of(std::size_t piece_idx) const noexcept {
    auto const& piece = pieces_[piece_idx];
    return direction_ == Direction::kLoad ? piece.region_offset_bytes : piece.image_offset_bytes;
  }
  [[nodiscard]] std::size_t begin_of(std::size_t piece_idx) const noexcept {
    return ends_[piece_idx] - pieces_[piece_idx].size_bytes;
  }

  Direction direction_;
  std::vector<Piece> pieces_;
  std::vector<std::size_t> ends_;        // of each piece, in bytes from the front of the order
  std::vector<std::size_t> by_offset_;   // piece indices, sorted by offset_of()
  std::vector<std::size_t> layer_ends_;  // in pieces
};

}  // namespace aegaeon
