#include "transfer/transfer_order.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "error.hpp"

namespace aegaeon {
namespace {

bool inside(std::size_t offset_bytes, std::size_t size_bytes, std::size_t limit) {
  return offset_bytes < limit && size_bytes <= limit - offset_bytes;
}

}  // namespace

TransferOrder::TransferOrder(Direction direction, std::vector<Piece> pieces,
                             std::optional<std::vector<std::size_t>> layer_ends,
                             std::size_t image_bytes, std::size_t region_bytes)
    : direction_(direction), pieces_(std::move(pieces)) {
  if (pieces_.empty()) throw std::invalid_argument("order is empty");
  ends_.reserve(pieces_.size());
  std::size_t total = 0;
  for (auto const& piece : pieces_) {
    if (piece.size_bytes == 0 || !inside(piece.image_offset_bytes, piece.size_bytes, image_bytes) ||
        !inside(piece.region_offset_bytes, piece.size_bytes, region_bytes)) {
      throw std::invalid_argument(
          concat("piece of ", piece.size_bytes, " bytes, at ", piece.region_offset_bytes,
                 " of the region and ", piece.image_offset_bytes,
                 " of the image, is empty or outside the image of ", image_bytes,
                 " bytes and the region of ", region_bytes, " bytes"));
    }
    ends_.push_back(total += piece.size_bytes);
  }
  by_offset_.resize(pieces_.size());
  std::iota(by_offset_.begin(), by_offset_.end(), std::size_t{0});
  std::sort(by_offset_.begin(), by_offset_.end(),
            [&](std::size_t a, std::size_t b) { return offset_of(a) < offset_of(b); });
  for (std::size_t i = 1; i < by_offset_.size(); ++i) {
    auto before = by_offset_[i - 1];
    auto after = by_offset_[i];
    if (offset_of(before) + pieces_[before].size_bytes > offset_of(after)) {
      throw std::invalid_argument(
          concat("pieces at ", offset_of(before), " and ", offset_of(after), " overlap"));
    }
  }
  if (!layer_ends) {
    layer_ends_.resize(pieces_.size());
    std::iota(layer_ends_.begin(), layer_ends_.end(), std::size_t{1});
    return;
  }
  layer_ends_ = *std::move(layer_ends);
  std::size_t reached = 0;
  for (auto end : layer_ends_) {
    if (end <= reached) {
      throw std::invalid_argument(concat("a layer that ends after ", end, " pieces has none"));
    }
    reached = end;
  }
  if (reached != pieces_.size()) {
    throw std::invalid_argument(
        concat("the layers end after ", reached, " of ", pieces_.size(), " pieces"));
  }
}

std::vector<Range> TransferOrder::in_region() const {
  std::vector<Range> ranges;
  ranges.reserve(pieces_.size());
  for (auto const& piece : pieces_) ranges.push_back({piece.region_offset_bytes, piece.size_bytes});
  return ranges;
}

std::size_t TransferOrder::bytes_through_layer(std::size_t layer_idx) const {
  if (layer_idx >= layer_ends_.size()) {
    throw std::invalid_argument(
        concat("layer ", layer_idx, " of an order of ", layer_ends_.size()));
  }
  return ends_[layer_ends_[layer_idx] - 1];
}

std::size_t TransferOrder::bytes_through(Range const& range) const {
  auto it = std::upper_bound(
      by_offset_.begin(), by_offset_.end(), range.offset_bytes,
      [&](std::size_t offset, std::size_t idx) { return offset < offset_of(idx); });
  if (it != by_offset_.begin()) --it;
  std::size_t needed = 0;
  auto reached = range.offset_bytes;
  auto left = range.size_bytes;
  for (; left != 0 && it != by_offset_.end(); ++it) {
    auto begin = offset_of(*it);
    auto end = begin + pieces_[*it].size_bytes;
    if (reached < begin || reached >= end) break;
    auto taken = std::min(left, end - reached);
    reached += taken;
    left -= taken;
    needed = std::max(needed, begin_of(*it) + (reached - begin));
  }
  if (left != 0) {
    throw std::invalid_argument(concat("the range (", range.offset_bytes, ", ", range.size_bytes,
                                       ") is not part of the order: nothing brings offset ",
                                       reached));
  }
  return needed;
}

std::vector<Range> TransferOrder::ranges_within(std::size_t num_bytes) const {
  std::vector<Range> ranges;
  for (auto idx : by_offset_) {
    auto begin = begin_of(idx);
    if (begin >= num_bytes) continue;
    auto bytes = std::min(pieces_[idx].size_bytes, num_bytes - begin);
    auto offset = offset_of(idx);
    if (!ranges.empty() && ranges.back().offset_bytes + ranges.back().size_bytes == offset) {
      ranges.back().size_bytes += bytes;
    } else {
      ranges.push_back({offset, bytes});
    }
  }
  return ranges;
}

std::vector<Piece> TransferOrder::take(Cursor& cursor, std::size_t chunk_bytes) const {
  std::vector<Piece> copies;
  std::size_t room = chunk_bytes;
  while (room > 0 && !at_end(cursor)) {
    auto const& piece = pieces_[cursor.piece_idx];
    auto in_region = piece.region_offset_bytes + cursor.piece_bytes;
    auto in_image = piece.image_offset_bytes + cursor.piece_bytes;
    auto bytes = std::min(room, piece.size_bytes - cursor.piece_bytes);
    auto* last = copies.empty() ? nullptr : &copies.back();
    if (last != nullptr && last->region_offset_bytes + last->size_bytes == in_region &&
        last->image_offset_bytes + last->size_bytes == in_image) {
      last->size_bytes += bytes;
    } else {
      copies.push_back({in_region, in_image, bytes});
    }
    room -= bytes;
    cursor.total_bytes += bytes;
    cursor.piece_bytes += bytes;
    if (cursor.piece_bytes == piece.size_bytes) {
      ++cursor.piece_idx;
      cursor.piece_bytes = 0;
    }
  }
  return copies;
}

}  // namespace aegaeon
