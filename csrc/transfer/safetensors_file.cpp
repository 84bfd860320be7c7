#include "transfer/safetensors_file.hpp"

#include <fcntl.h>

#include <array>
#include <span>
#include <utility>

#include "error.hpp"

namespace aegaeon {
namespace {

bool same(timespec const& a, timespec const& b) noexcept {
  return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::string path) : path_(std::move(path)) {
  // Not blocking: a pipe of that name must not hold us up.
  file_ = FileDescriptor(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file_) throw_errno("open", path_);
  if (fstat(fd(), &status_) != 0) throw_errno("stat", path_);
  if (!S_ISREG(status_.st_mode)) throw IntegrityError(concat(path_, ": not a file"));
  if (size_bytes() < kSafetensorsLengthBytes) {
    throw IntegrityError(concat(path_, ": not a safetensors file: ", size_bytes(), " bytes"));
  }
  std::array<std::byte, kSafetensorsLengthBytes> length{};
  read_all(fd(), length.data(), length.size(), 0, path_);
  std::string json(parse_safetensors_length(length, size_bytes(), path_), '\0');
  read_all(fd(), json.data(), json.size(), length.size(), path_);
  header_ = parse_safetensors_header(json, size_bytes() - length.size() - json.size(), path_);
  require_unchanged();
}

void SafetensorsFile::require_unchanged() const {
  struct stat now{};
  if (fstat(fd(), &now) != 0) throw_errno("stat", path_);
  if (now.st_size == status_.st_size && same(now.st_mtim, status_.st_mtim)) return;
  throw IntegrityError(concat(path_, ": was written to while it was read"));
}

}  // namespace aegaeon
