// ImageDirectory: images that other processes may open by name, and leases that end with those who
// hold them.
//
// An image's file has no name until it is complete: of a publisher that dies before, nothing is
// left. Whoever uses the file, its publisher too, has a read lock on it (of the open file
// description, so the kernel drops it with the process, or with the last child of fork() that
// shares it). A name whose file nobody has locked is garbage. To take a name away from a dead
// holder, one has to lock its file for writing; to use a file, one looks whether it still has its
// name after locking it.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "driver/driver.hpp"
#include "transfer/file.hpp"
#include "transfer/host_memory.hpp"
#include "transfer/host_pages.hpp"
#include "transfer/image_footer.hpp"
#include "transfer/registration.hpp"

namespace aegaeon {

class ImageDirectory {
 public:
  // Made, for its owner alone (0700), if it does not exist. Throws FileError, and for one that
  // another user owns or may write to.
  explicit ImageDirectory(std::string path);

  [[nodiscard]] std::string const& path() const noexcept { return path_; }
  // Of images somebody holds, or held when he was killed.
  [[nodiscard]] std::vector<std::string> names() const;
  // Removes the names that nobody holds, and tells them.
  std::vector<std::string> collect_garbage() const;

 private:
  friend class SharedImage;

  // Throws std::invalid_argument for what is not a name: 1 to 200 of A-Z a-z 0-9 . _ -, the first
  // not a dot or dash.
  [[nodiscard]] static std::string file_name(std::string const& name);
  // Locked for reading, and still of that name. Throws FileError when there is none.
  [[nodiscard]] FileDescriptor open_leased(std::string const& name) const;
  enum class Holder { kNobody, kLiving };
  // Removes the name if nobody holds its file; then, or when it is not there, kNobody.
  Holder remove_stale(std::string const& name) const;
  // Takes the name from a file of ours; not from another that has it by now.
  void remove(std::string const& file_name, int fd) const;
  [[nodiscard]] bool shows(std::string const& file_name, int fd) const;

  std::string const path_;
  FileDescriptor directory_;
};

// An image's memory in a file of such a directory.
class SharedImage {
 public:
  // New memory, present, and locked if the driver can. It has no name yet. Throws OutOfMemory,
  // FileError.
  SharedImage(std::shared_ptr<Driver> driver, ImageDirectory directory, std::size_t size_bytes,
              std::size_t num_threads);
  // A published one, to be read only. Throws FileError, IntegrityError, OutOfMemory.
  SharedImage(std::shared_ptr<Driver> driver, ImageDirectory directory, std::string name);
  // Takes the name away, if it was published here.
  ~SharedImage();
  SharedImage(SharedImage const&) = delete;  // owns the lease
  SharedImage& operator=(SharedImage const&) = delete;

  // Why the driver could not lock it; empty when it has.
  [[nodiscard]] std::string const& pin_error() const noexcept { return pin_error_; }
  // Keeps what it is called on.
  static HostMemory memory(std::shared_ptr<SharedImage> const& image);
  [[nodiscard]] bool opened() const noexcept { return opened_; }
  [[nodiscard]] ImageFooter const& footer() const noexcept { return footer_; }  // of an opened one

  // Under that name other processes find it from now on; nobody can write to it any more. Throws
  // LifecycleError when it has been published, or a living image has the name; FileError.
  void publish(std::string const& name, ImageFooter const& footer);
  // No process finds it from now on; those that have opened it keep it. Throws LifecycleError
  // unless it is published here, FileError.
  void unpublish();
  [[nodiscard]] std::string published_name() const;  // empty: not, or no longer
  // Whether others hold a lease.
  [[nodiscard]] bool leased() const;

 private:
  void lock_pages();

  std::shared_ptr<Driver> const driver_;
  ImageDirectory const directory_;
  bool const opened_;
  int const process_;
  std::size_t size_bytes_ = 0;
  FileDescriptor file_;
  ImageFooter footer_;
  std::optional<MappedPages> pages_;
  std::optional<Registration> registration_;
  std::string pin_error_;
  mutable std::mutex mutex_;  // guards all that follows
  std::string name_;
  bool was_published_ = false;
};

}  // namespace aegaeon
