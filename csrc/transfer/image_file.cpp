#include "transfer/image_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include "error.hpp"
#include "transfer/crc32c.hpp"

namespace aegaeon {
namespace {

// Read and summed in parts of this, so that the sum finds them in the cache.
constexpr std::size_t kPartBytes = std::size_t{1} << 20;

}  // namespace

ImageFooter read_image_footer(int fd, std::string const& path) {
  struct stat status{};
  if (fstat(fd, &status) != 0) throw_errno("stat", path);
  if (!S_ISREG(status.st_mode)) throw IntegrityError(concat(path, ": not a file"));
  auto file_bytes = static_cast<std::size_t>(status.st_size);
  if (file_bytes < kImageTailBytes) {
    throw IntegrityError(concat(path, ": not an image: ", file_bytes, " bytes"));
  }
  std::array<std::byte, kImageTailBytes> bytes{};
  read_all(fd, bytes.data(), bytes.size(), file_bytes - bytes.size(), path);
  auto tail = parse_image_tail(bytes, file_bytes, path);
  std::vector<std::byte> footer(tail.footer_bytes());
  read_all(fd, footer.data(), footer.size(), tail.payload_bytes, path);
  return parse_image_footer(tail, footer, path);
}

ImageFile::ImageFile(std::string path) : path_(std::move(path)) {
  // Not blocking: a pipe of that name must not hold us up.
  file_ = FileDescriptor(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file_) throw_errno("open", path_);
  footer_ = read_image_footer(file_.get(), path_);
}

void ImageFile::read_into(HostImage& image, bool verify, std::size_t num_threads,
                          Progress const& progress) const {
  if (image.size_bytes() != size_bytes()) {
    throw std::invalid_argument(concat("image '", image.name(), "' has ", image.size_bytes(),
                                       " bytes, ", path_, " ", size_bytes()));
  }
  {
    auto writer = image.write();
    auto found = footer_.checksums;
    auto read_chunk = [&](std::size_t i) {
      auto begin = i * kImageChunkBytes;
      auto end = std::min(begin + kImageChunkBytes, size_bytes());
      std::uint32_t sum = 0;
      for (auto offset = begin; offset < end; offset += kPartBytes) {
        auto part = std::min(kPartBytes, end - offset);
        read_all(file_.get(), image.data() + offset, part, offset, path_);
        if (verify) sum = crc32c(image.data() + offset, part, sum);
      }
      if (verify) found[i] = sum;
    };
    parallel_for(found.size(), num_threads, read_chunk,
                 in_bytes(progress, kImageChunkBytes, size_bytes()));
    auto bad = describe_bad_chunks(footer_.checksums, found, size_bytes());
    if (!bad.empty()) throw IntegrityError(concat(path_, ": ", bad));
  }
  image.seal_as(footer_);
}

void save_image(HostImage const& image, std::string const& path, std::size_t num_threads,
                Progress const& progress) {
  auto footer = image.footer();
  auto slash = path.find_last_of('/');
  auto folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  auto name = slash == std::string::npos ? path : path.substr(slash + 1);
  if (name.empty() || name == "." || name == "..") {
    throw std::invalid_argument(concat("'", path, "' does not name a file"));
  }
  FileDescriptor directory(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory) throw_errno("open the folder of", path);
  NewFile file(directory.get(), name, path);
  auto write_chunk = [&](std::size_t i) {
    auto offset = i * kImageChunkBytes;
    auto bytes = std::min(kImageChunkBytes, image.size_bytes() - offset);
    write_all(file.fd(), image.data() + offset, bytes, offset, path);
  };
  parallel_for(footer.checksums.size(), num_threads, write_chunk,
               in_bytes(progress, kImageChunkBytes, image.size_bytes()));
  auto bytes = footer.serialize();
  write_all(file.fd(), bytes.data(), bytes.size(), image.size_bytes(), path);
  file.replace();
}

}  // namespace aegaeon
