// Fills images from files in several threads, in few large reads, each byte summed while the cache
// still holds it; and compares them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transfer/host_image.hpp"
#include "transfer/parallel.hpp"
#include "transfer/safetensors_file.hpp"

namespace aegaeon {

// Bytes of a file, and their place in the image.
struct FilePiece {
  std::size_t file_idx = 0;
  std::uint64_t file_offset = 0;
  std::size_t image_offset = 0;
  std::size_t size_bytes = 0;

  [[nodiscard]] std::size_t image_end() const noexcept { return image_offset + size_bytes; }
};

class FileReader {
 public:
  // The pieces in the order of the image; those that are neighbours on both sides become one.
  // Throws std::invalid_argument for pieces that overlap in the image or lie outside of a file.
  FileReader(std::vector<std::shared_ptr<SafetensorsFile>> files, std::vector<FilePiece> pieces);

  [[nodiscard]] std::size_t num_pieces() const noexcept { return pieces_.size(); }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return size_bytes_; }

  // Reads every piece to its place, makes the bytes between them zero, and seals the image, with
  // that layout; unless one of `comparisons` finds differences(), which are returned. Progress is
  // in bytes of the image, once over for the reading and once more for each comparison. After
  // FileError (the system could not read), IntegrityError (a file is shorter than it was, or was
  // written to), what progress throws, and differences, the image is not sealed, and its contents
  // are anything.
  std::vector<std::size_t> fill(HostImage& image, std::string layout,
                                std::vector<FileReader const*> const& comparisons,
                                std::size_t num_threads, Progress const& progress) const;

  // The offsets in the image of the first difference in each piece and chunk that has one.
  // Progress is in bytes of the image. Throws FileError, IntegrityError as fill() does.
  [[nodiscard]] std::vector<std::size_t> differences(HostImage const& image,
                                                     std::size_t num_threads,
                                                     Progress const& progress) const;

 private:
  [[nodiscard]] std::vector<std::uint32_t> read(HostImage& image, std::size_t num_threads,
                                                Progress const& progress) const;
  void require_fits(HostImage const& image) const;
  void require_unchanged() const;
  // Calls on_piece for what each piece has in [begin, end), and on_gap(begin, end) for what lies
  // between, in order.
  template <typename OnPiece, typename OnGap>
  void for_each_part(std::size_t begin, std::size_t end, OnPiece on_piece, OnGap on_gap) const;

  std::vector<std::shared_ptr<SafetensorsFile>> const files_;
  std::vector<FilePiece> pieces_;
  std::size_t size_bytes_ = 0;  // of all pieces
};

}  // namespace aegaeon
