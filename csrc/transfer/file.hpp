// Files for images: descriptors that close themselves, reads and writes that are complete or throw.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "error.hpp"

namespace aegaeon {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) noexcept : fd_(fd) {}
  ~FileDescriptor() { reset(); }
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }

  [[nodiscard]] int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  void reset() noexcept;

 private:
  int fd_ = -1;
};

// Throws FileError for the error number that the last system call left.
[[noreturn]] void throw_errno(char const* what, std::string const& path);

// Both go on after a short transfer or a signal. Reading past the end throws IntegrityError.
void read_all(int fd, void* data, std::size_t bytes, std::uint64_t offset, std::string const& path);
void write_all(int fd, void const* data, std::size_t bytes, std::uint64_t offset,
               std::string const& path);

// A new file that appears under its name complete or not at all. Nothing is left of one that is not
// published, not even by a killed process where the file system has files without names.
class NewFile {
 public:
  // directory: an open one, which the file keeps no hold of; path: of the file to be, for messages.
  // named: begin under a temporary name, as file systems without O_TMPFILE are treated anyway.
  NewFile(int directory, std::string name, std::string path, bool named = false);
  ~NewFile();
  NewFile(NewFile const&) = delete;  // owns the temporary name
  NewFile& operator=(NewFile const&) = delete;

  [[nodiscard]] int fd() const noexcept { return file_.get(); }
  // On disk first, then under its name, in place of what had it.
  void replace();

 private:
  void remove_temporary() noexcept;

  int const directory_;
  std::string const name_;
  std::string const path_;
  std::string temporary_;  // empty: the file has no name yet
  FileDescriptor file_;
};

}  // namespace aegaeon
