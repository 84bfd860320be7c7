// An open safetensors file: its header, and whether it is still the file whose header that was.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>

#include "transfer/file.hpp"
#include "transfer/safetensors_header.hpp"

namespace aegaeon {

class SafetensorsFile {
 public:
  // Throws FileError, IntegrityError.
  explicit SafetensorsFile(std::string path);

  [[nodiscard]] std::string const& path() const noexcept { return path_; }
  [[nodiscard]] int fd() const noexcept { return file_.get(); }
  [[nodiscard]] std::uint64_t size_bytes() const noexcept {
    return static_cast<std::uint64_t>(status_.st_size);
  }
  [[nodiscard]] SafetensorsHeader const& header() const noexcept { return header_; }
  // Throws IntegrityError if the file was written to since it was opened. A file that took its name
  // meanwhile is another one, and does no harm.
  void require_unchanged() const;

 private:
  std::string const path_;
  FileDescriptor file_;
  struct stat status_{};
  SafetensorsHeader header_;
};

}  // namespace aegaeon
