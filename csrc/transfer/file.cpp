#include "transfer/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <random>

namespace aegaeon {
namespace {

constexpr std::size_t kMaxTransferBytes = std::size_t{1} << 30;  // the kernel's own limit is 2 GiB

std::string temporary_name(std::string const& name) {
  static constexpr char kDigits[] = "0123456789abcdefghijklmnopqrstuv";
  std::random_device random;
  std::string suffix;
  for (int i = 0; i < 12; ++i) suffix += kDigits[random() % 32];
  // Names may be as long as the file system allows; their temporary ones are no longer.
  return concat(".", name.substr(0, 200), ".", suffix, ".tmp");
}

}  // namespace

void FileDescriptor::reset() noexcept {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void throw_errno(char const* what, std::string const& path) {
  throw FileError(what, errno, path);
}

void read_all(int fd, void* data, std::size_t bytes, std::uint64_t offset,
              std::string const& path) {
  auto* to = static_cast<std::byte*>(data);
  while (bytes > 0) {
    auto count = pread(fd, to, std::min(bytes, kMaxTransferBytes), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno("read", path);
    if (count == 0) throw IntegrityError(concat(path, ": ends at byte ", offset));
    to += count;
    bytes -= static_cast<std::size_t>(count);
    offset += static_cast<std::uint64_t>(count);
  }
}

void write_all(int fd, void const* data, std::size_t bytes, std::uint64_t offset,
               std::string const& path) {
  auto const* from = static_cast<std::byte const*>(data);
  while (bytes > 0) {
    auto count = pwrite(fd, from, std::min(bytes, kMaxTransferBytes), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno("write", path);
    from += count;
    bytes -= static_cast<std::size_t>(count);
    offset += static_cast<std::uint64_t>(count);
  }
}

NewFile::NewFile(int directory, std::string name, std::string path, bool named)
    : directory_(directory), name_(std::move(name)), path_(std::move(path)) {
  if (!named) {
    file_ = FileDescriptor(openat(directory, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    if (file_) return;
    // What the manual page says of file systems, and of kernels, that cannot do it.
    if (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT && errno != EINVAL) {
      throw_errno("create", path_);
    }
  }
  auto temporary = temporary_name(name_);
  file_ = FileDescriptor(
      openat(directory, temporary.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
  if (!file_) throw_errno("create", path_);
  temporary_ = std::move(temporary);
}

NewFile::~NewFile() {
  remove_temporary();
}

void NewFile::remove_temporary() noexcept {
  if (!temporary_.empty()) unlinkat(directory_, temporary_.c_str(), 0);
  temporary_.clear();
}

void NewFile::replace() {
  if (fsync(fd()) != 0) throw_errno("fsync", path_);
  if (temporary_.empty()) {  // only a name can replace a name
    auto temporary = temporary_name(name_);
    auto source = concat("/proc/self/fd/", fd());
    if (linkat(AT_FDCWD, source.c_str(), directory_, temporary.c_str(), AT_SYMLINK_FOLLOW) != 0) {
      throw_errno("link", path_);
    }
    temporary_ = std::move(temporary);
  }
  if (renameat(directory_, temporary_.c_str(), directory_, name_.c_str()) != 0) {
    throw_errno("rename", path_);
  }
  temporary_.clear();
  if (fsync(directory_) != 0) throw_errno("fsync of the folder of", path_);
}

}  // namespace aegaeon
