// Images as files on disk: saved at once or not at all, opened only if they are what was saved.
#pragma once

#include <cstddef>
#include <string>

#include "transfer/file.hpp"
#include "transfer/host_image.hpp"
#include "transfer/image_footer.hpp"
#include "transfer/parallel.hpp"

namespace aegaeon {

// A file whose footer has been read and found valid.
class ImageFile {
 public:
  // Throws FileError, IntegrityError.
  explicit ImageFile(std::string path);

  [[nodiscard]] std::size_t size_bytes() const noexcept { return footer_.payload_bytes; }
  [[nodiscard]] ImageFooter const& footer() const noexcept { return footer_; }

  // Fills an image of that size from the file and seals it. With verify every chunk is compared
  // with its checksum as it is read. Progress is in bytes. After FileError or IntegrityError the
  // image is not sealed, and its contents are anything.
  void read_into(HostImage& image, bool verify, std::size_t num_threads,
                 Progress const& progress) const;
  void close() noexcept { file_.reset(); }

 private:
  std::string const path_;
  FileDescriptor file_;
  ImageFooter footer_;
};

// The footer of an open file. Throws FileError, IntegrityError.
ImageFooter read_image_footer(int fd, std::string const& path);

// Replaces the file of that path, if there is one, when all is written and on disk. Throws
// LifecycleError unless the image is sealed, FileError.
void save_image(HostImage const& image, std::string const& path, std::size_t num_threads,
                Progress const& progress);

}  // namespace aegaeon
