#include "transfer/file_reader.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "error.hpp"
#include "transfer/crc32c.hpp"

namespace aegaeon {
namespace {

// Read and summed in parts of this, so that the sum finds them in the cache.
constexpr std::size_t kPartBytes = std::size_t{1} << 20;

Progress behind(Progress const& progress, std::size_t bytes) {
  if (!progress) return nullptr;
  return [&progress, bytes](std::size_t num_bytes) { progress(bytes + num_bytes); };
}

}  // namespace

FileReader::FileReader(std::vector<std::shared_ptr<SafetensorsFile>> files,
                       std::vector<FilePiece> pieces)
    : files_(std::move(files)) {
  for (auto const& piece : pieces) {
    if (piece.size_bytes == 0) continue;
    if (piece.file_idx >= files_.size()) {
      throw std::invalid_argument(
          concat("a piece of file ", piece.file_idx, " of ", files_.size()));
    }
    auto const& file = *files_[piece.file_idx];
    if (piece.file_offset > file.size_bytes() ||
        piece.size_bytes > file.size_bytes() - piece.file_offset) {
      throw std::invalid_argument(concat(piece.size_bytes, " bytes at ", piece.file_offset, " of ",
                                         file.path(), ", which has ", file.size_bytes()));
    }
    if (!pieces_.empty() && piece.image_offset < pieces_.back().image_end()) {
      throw std::invalid_argument(concat("a piece at ", piece.image_offset,
                                         " of the image begins before the one in front of it "
                                         "ends, at ",
                                         pieces_.back().image_end()));
    }
    if (piece.image_end() < piece.image_offset) {
      throw std::invalid_argument(concat("a piece at ", piece.image_offset, " of the image, with ",
                                         piece.size_bytes, " bytes"));
    }
    size_bytes_ += piece.size_bytes;
    if (!pieces_.empty()) {
      auto& last = pieces_.back();
      if (last.file_idx == piece.file_idx && last.image_end() == piece.image_offset &&
          last.file_offset + last.size_bytes == piece.file_offset) {
        last.size_bytes += piece.size_bytes;
        continue;
      }
    }
    pieces_.push_back(piece);
  }
}

void FileReader::require_fits(HostImage const& image) const {
  auto end = pieces_.empty() ? 0 : pieces_.back().image_end();
  if (end <= image.size_bytes()) return;
  throw std::invalid_argument(concat("the last piece ends at ", end, ", behind the image of ",
                                     image.size_bytes(), " bytes"));
}

void FileReader::require_unchanged() const {
  for (auto const& file : files_) file->require_unchanged();
}

template <typename OnPiece, typename OnGap>
void FileReader::for_each_part(std::size_t begin, std::size_t end, OnPiece on_piece,
                               OnGap on_gap) const {
  auto ends_behind = [](std::size_t offset, FilePiece const& piece) {
    return offset < piece.image_end();
  };
  auto next = std::upper_bound(pieces_.begin(), pieces_.end(), begin, ends_behind);
  for (auto at = begin; at < end;) {
    auto piece_begin = next == pieces_.end() ? end : std::min(end, next->image_offset);
    if (at < piece_begin) {
      on_gap(at, piece_begin);
      at = piece_begin;
      continue;
    }
    auto skipped = at - next->image_offset;
    auto size = std::min(end, next->image_end()) - at;
    on_piece(FilePiece{.file_idx = next->file_idx,
                       .file_offset = next->file_offset + skipped,
                       .image_offset = at,
                       .size_bytes = size});
    at += size;
    ++next;
  }
}

std::vector<std::uint32_t> FileReader::read(HostImage& image, std::size_t num_threads,
                                            Progress const& progress) const {
  std::vector<std::uint32_t> sums(num_image_chunks(image.size_bytes()));
  auto read_chunk = [&](std::size_t i) {
    auto begin = i * HostImage::kChunkBytes;
    auto end = std::min(begin + HostImage::kChunkBytes, image.size_bytes());
    std::uint32_t sum = 0;
    for_each_part(
        begin, end,
        [&](FilePiece const& piece) {
          auto const& file = *files_[piece.file_idx];
          for (std::size_t done = 0; done < piece.size_bytes;) {
            auto part = std::min(kPartBytes, piece.size_bytes - done);
            auto* to = image.data() + piece.image_offset + done;
            read_all(file.fd(), to, part, piece.file_offset + done, file.path());
            sum = crc32c(to, part, sum);
            done += part;
          }
        },
        [&](std::size_t gap_begin, std::size_t gap_end) {
          std::memset(image.data() + gap_begin, 0, gap_end - gap_begin);
          sum = crc32c(image.data() + gap_begin, gap_end - gap_begin, sum);
        });
    sums[i] = sum;
  };
  parallel_for(sums.size(), num_threads, read_chunk,
               in_bytes(progress, HostImage::kChunkBytes, image.size_bytes()));
  require_unchanged();
  return sums;
}

std::vector<std::size_t> FileReader::fill(HostImage& image, std::string layout,
                                          std::vector<FileReader const*> const& comparisons,
                                          std::size_t num_threads, Progress const& progress) const {
  require_fits(image);
  ImageFooter footer{.payload_bytes = image.size_bytes(),
                     .checksums = {},
                     .metadata = image.metadata(),
                     .layout = std::move(layout)};
  {
    auto writer = image.write();
    footer.checksums = read(image, num_threads, progress);
    std::vector<std::size_t> found;
    for (std::size_t i = 0; i < comparisons.size(); ++i) {
      auto further = comparisons[i]->differences(image, num_threads,
                                                 behind(progress, (i + 1) * image.size_bytes()));
      found.insert(found.end(), further.begin(), further.end());
    }
    if (!found.empty()) return found;
  }
  image.seal_as(std::move(footer));
  return {};
}

std::vector<std::size_t> FileReader::differences(HostImage const& image, std::size_t num_threads,
                                                 Progress const& progress) const {
  require_fits(image);
  std::mutex mutex;
  std::vector<std::size_t> found;
  auto compare_chunk = [&](std::size_t i) {
    auto begin = i * HostImage::kChunkBytes;
    auto end = std::min(begin + HostImage::kChunkBytes, image.size_bytes());
    std::vector<std::byte> read(std::min(kPartBytes, end - begin));
    auto compare = [&](FilePiece const& piece) {
      auto const& file = *files_[piece.file_idx];
      for (std::size_t done = 0; done < piece.size_bytes;) {
        auto part = std::min(read.size(), piece.size_bytes - done);
        auto const* expected = image.data() + piece.image_offset + done;
        read_all(file.fd(), read.data(), part, piece.file_offset + done, file.path());
        if (std::memcmp(read.data(), expected, part) != 0) {
          auto differs = std::mismatch(expected, expected + part, read.data()).first;
          std::lock_guard lock(mutex);
          found.push_back(static_cast<std::size_t>(differs - image.data()));
          return;
        }
        done += part;
      }
    };
    for_each_part(begin, end, compare, [](std::size_t, std::size_t) {});
  };
  parallel_for(num_image_chunks(image.size_bytes()), num_threads, compare_chunk,
               in_bytes(progress, HostImage::kChunkBytes, image.size_bytes()));
  require_unchanged();
  std::ranges::sort(found);
  return found;
}

}  // namespace aegaeon
