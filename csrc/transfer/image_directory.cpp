#include "transfer/image_directory.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <string_view>
#include <thread>
#include <utility>

#include "error.hpp"
#include "transfer/image_file.hpp"

namespace aegaeon {
namespace {

constexpr std::string_view kSuffix = ".image";
constexpr std::size_t kMaxNameBytes = 200;

struct flock whole_file(short type) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return lock;
}

// False when another holder is in the way.
bool try_lock(int fd, short type, std::string const& path) {
  auto lock = whole_file(type);
  if (fcntl(fd, F_OFD_SETLK, &lock) == 0) return true;
  if (errno != EAGAIN && errno != EACCES) throw_errno("lock", path);
  return false;
}

// Nobody has a file locked for writing for longer than it takes to remove its name.
constexpr auto kWriterPause = std::chrono::milliseconds(1);
constexpr int kMaxWriterPauses = 5000;

struct stat status_of(int fd, std::string const& path) {
  struct stat status{};
  if (fstat(fd, &status) != 0) throw_errno("stat", path);
  return status;
}

bool is_name(std::string_view name) {
  if (name.empty() || name.size() > kMaxNameBytes) return false;
  if (name.front() == '.' || name.front() == '-') return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  });
}

}  // namespace

ImageDirectory::ImageDirectory(std::string path) : path_(std::move(path)) {
  if (mkdir(path_.c_str(), 0700) != 0 && errno != EEXIST) throw_errno("create", path_);
  directory_ = FileDescriptor(open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!directory_) throw_errno("open", path_);
  auto status = status_of(directory_.get(), path_);
  // Somebody else could replace an image, or cut off what we have mapped.
  if (status.st_uid != geteuid() || (status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    throw FileError("trust a folder that others may write to,", EPERM, path_);
  }
}

std::string ImageDirectory::file_name(std::string const& name) {
  if (is_name(name)) return name + std::string(kSuffix);
  throw std::invalid_argument(concat("no name for a shared image (1 to ", kMaxNameBytes,
                                     " of A-Z a-z 0-9 . _ -, no dot or dash in front): '", name,
                                     "'"));
}

std::vector<std::string> ImageDirectory::names() const {
  // The stream has a position; another descriptor keeps ours at the start.
  int fd = openat(directory_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* stream = fd >= 0 ? fdopendir(fd) : nullptr;
  if (stream == nullptr) throw_errno("list", path_);
  std::vector<std::string> found;
  while (auto const* entry = readdir(stream)) {
    std::string_view file = entry->d_name;
    if (!file.ends_with(kSuffix)) continue;
    file.remove_suffix(kSuffix.size());
    if (is_name(file)) found.emplace_back(file);
  }
  closedir(stream);
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<std::string> ImageDirectory::collect_garbage() const {
  std::vector<std::string> removed;
  for (auto const& name : names()) {
    if (remove_stale(name) == Holder::kNobody) removed.push_back(name);
  }
  return removed;
}

bool ImageDirectory::shows(std::string const& file, int fd) const {
  struct stat named{};
  if (fstatat(directory_.get(), file.c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0) return false;
  auto ours = status_of(fd, path_);
  return named.st_dev == ours.st_dev && named.st_ino == ours.st_ino;
}

void ImageDirectory::remove(std::string const& file, int fd) const {
  if (!shows(file, fd)) return;
  if (unlinkat(directory_.get(), file.c_str(), 0) != 0 && errno != ENOENT) {
    throw_errno("remove", path_ + "/" + file);
  }
}

ImageDirectory::Holder ImageDirectory::remove_stale(std::string const& name) const {
  auto file = file_name(name);
  auto path = path_ + "/" + file;
  FileDescriptor fd(openat(directory_.get(), file.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
  if (!fd) {
    if (errno == ENOENT) return Holder::kNobody;
    throw_errno("open", path);
  }
  for (int pauses = 0; !try_lock(fd.get(), F_WRLCK, path); ++pauses) {
    // A reader's lock would let us read: he lives. Otherwise the name is being removed.
    auto lock = whole_file(F_RDLCK);
    if (fcntl(fd.get(), F_OFD_GETLK, &lock) != 0) throw_errno("ask for locks of", path);
    if (lock.l_type == F_UNLCK || pauses == kMaxWriterPauses) return Holder::kLiving;
    std::this_thread::sleep_for(kWriterPause);
  }
  // Only who has the lock may take the name away, so that what remove() sees stays so.
  remove(file, fd.get());
  return Holder::kNobody;
}

FileDescriptor ImageDirectory::open_leased(std::string const& name) const {
  auto file = file_name(name);
  auto path = path_ + "/" + file;
  for (int pauses = 0; pauses < kMaxWriterPauses; ++pauses) {
    FileDescriptor fd(openat(directory_.get(), file.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
    if (!fd) throw_errno("open", path);
    if (!try_lock(fd.get(), F_RDLCK, path)) {  // somebody is removing the name
      std::this_thread::sleep_for(kWriterPause);
      continue;
    }
    if (!shows(file, fd.get())) continue;  // somebody has
    if (status_of(fd.get(), path).st_uid != geteuid()) {
      throw FileError("trust a file of another user,", EPERM, path);
    }
    return fd;
  }
  throw FileError("lock", EAGAIN, path);
}

SharedImage::SharedImage(std::shared_ptr<Driver> driver, ImageDirectory directory,
                         std::size_t size_bytes, std::size_t num_threads)
    : driver_(std::move(driver)),
      directory_(std::move(directory)),
      opened_(false),
      process_(getpid()),
      size_bytes_(size_bytes) {
  if (size_bytes == 0) throw std::invalid_argument("a host image has at least one byte");
  file_ = FileDescriptor(
      openat(directory_.directory_.get(), ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!file_) throw_errno("create a file without a name in", directory_.path());
  if (!try_lock(file_.get(), F_RDLCK, directory_.path())) {
    throw std::logic_error("a file that nobody knows is locked");
  }
  require_available(size_bytes);
  if (ftruncate(file_.get(), static_cast<off_t>(size_bytes)) != 0) {
    throw_errno("size a file in", directory_.path());
  }
  pages_.emplace(file_.get(), size_bytes);
  prefer_huge_pages(pages_->data(), size_bytes);
  populate(file_.get(), pages_->data(), size_bytes, num_threads);
  lock_pages();
}

SharedImage::SharedImage(std::shared_ptr<Driver> driver, ImageDirectory directory, std::string name)
    : driver_(std::move(driver)),
      directory_(std::move(directory)),
      opened_(true),
      process_(getpid()),
      file_(directory_.open_leased(name)) {
  footer_ = read_image_footer(file_.get(), concat("shared image '", name, "'"));
  size_bytes_ = footer_.payload_bytes;
  // Drivers lock what is writable; that the pages are read-only here comes after.
  pages_.emplace(file_.get(), size_bytes_);
  prefer_huge_pages(pages_->data(), size_bytes_);
  lock_pages();
  pages_->make_read_only();
}

SharedImage::~SharedImage() {
  // A child of fork() has a copy of this object, but the name is its parent's.
  if (name_.empty() || getpid() != process_) return;
  try {
    unpublish();
  } catch (Error const& error) {  // the name is garbage from now on, and will be collected
    std::fprintf(stderr, "aegaeon_kernels: %s\n", error.what());
  }
}

void SharedImage::lock_pages() {
  try {
    registration_.emplace(driver_, pages_->data(), size_bytes_);
  } catch (DriverError const& error) {  // copies are correct without, if slow
    pin_error_ = error.what();
  }
}

HostMemory SharedImage::memory(std::shared_ptr<SharedImage> const& image) {
  bool several = image->size_bytes_ > Registration::kPieceBytes;
  return {.data = image->pages_->data(),
          .size_bytes = image->size_bytes_,
          .pinned = image->registration_ && image->driver_->kind() == DeviceKind::kCuda,
          .piece_bytes = several ? Registration::kPieceBytes : 0,
          .keep = image};
}

void SharedImage::publish(std::string const& name, ImageFooter const& footer) {
  auto file = ImageDirectory::file_name(name);
  auto path = directory_.path() + "/" + file;
  std::lock_guard lock(mutex_);
  if (opened_ || was_published_) {
    throw LifecycleError(concat("publish of image '", name, "': it has been published already"));
  }
  auto bytes = footer.serialize();
  write_all(file_.get(), bytes.data(), bytes.size(), size_bytes_, path);
  pages_->make_read_only();
  auto source = concat("/proc/self/fd/", file_.get());
  auto link = [&] {
    return linkat(AT_FDCWD, source.c_str(), directory_.directory_.get(), file.c_str(),
                  AT_SYMLINK_FOLLOW) == 0;
  };
  while (!link()) {
    if (errno != EEXIST) throw_errno("publish", path);
    if (directory_.remove_stale(name) == ImageDirectory::Holder::kLiving) {
      throw LifecycleError(concat("publish of image '", name, "': a living image in ",
                                  directory_.path(), " has the name"));
    }
  }
  name_ = name;
  was_published_ = true;
}

void SharedImage::unpublish() {
  std::lock_guard lock(mutex_);
  if (name_.empty()) throw LifecycleError("unpublish of an image that is not published here");
  directory_.remove(ImageDirectory::file_name(name_), file_.get());
  name_.clear();
}

std::string SharedImage::published_name() const {
  std::lock_guard lock(mutex_);
  return name_;
}

bool SharedImage::leased() const {
  auto lock = whole_file(F_WRLCK);
  if (fcntl(file_.get(), F_OFD_GETLK, &lock) != 0)
    throw_errno("ask for locks in", directory_.path());
  return lock.l_type != F_UNLCK;
}

}  // namespace aegaeon
