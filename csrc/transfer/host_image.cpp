#include "transfer/host_image.hpp"

#include <algorithm>
#include <utility>

#include "error.hpp"
#include "transfer/crc32c.hpp"

namespace aegaeon {
namespace {

HostMemory allocate(std::shared_ptr<Driver> driver, std::size_t size_bytes) {
  if (size_bytes == 0) throw std::invalid_argument("a host image has at least one byte");
  return allocate_by_driver(std::move(driver), size_bytes);
}

void require_at_most(std::size_t limit, std::string const& json, char const* what) {
  if (json.size() <= limit) return;
  throw std::invalid_argument(
      concat(what, " of ", json.size(), " bytes, over the limit of ", limit));
}

}  // namespace

HostImage::HostImage(HostMemory memory, std::string name)
    : memory_(std::move(memory)), name_(std::move(name)) {
  footer_.payload_bytes = memory_.size_bytes;
}

HostImage::HostImage(std::shared_ptr<Driver> driver, std::size_t size_bytes, std::string name)
    : HostImage(allocate(std::move(driver), size_bytes), std::move(name)) {}

std::vector<std::uint32_t> HostImage::compute(std::size_t num_threads,
                                              Progress const& progress) const {
  std::vector<std::uint32_t> sums(num_image_chunks(size_bytes()));
  auto sum_chunk = [&](std::size_t i) {
    auto offset = i * kChunkBytes;
    sums[i] = crc32c(data() + offset, std::min(kChunkBytes, size_bytes() - offset));
  };
  parallel_for(sums.size(), num_threads, sum_chunk, progress);
  return sums;
}

void HostImage::require_open(char const* operation) const {
  if (!sealed_) return;
  throw LifecycleError(concat(operation, " image '", name_, "': it is sealed already"));
}

void HostImage::require_sealed() const {
  if (!sealed_) throw LifecycleError(concat("image '", name_, "' is not sealed"));
}

std::string HostImage::metadata() const {
  std::lock_guard lock(mutex_);
  return footer_.metadata;
}

std::string HostImage::layout() const {
  std::lock_guard lock(mutex_);
  return footer_.layout;
}

void HostImage::set_metadata(std::string json) {
  require_at_most(kMaxMetadataBytes, json, "metadata");
  std::lock_guard lock(mutex_);
  require_open("metadata of");
  footer_.metadata = std::move(json);
}

void HostImage::set_layout(std::string json) {
  require_at_most(kMaxLayoutBytes, json, "a layout");
  std::lock_guard lock(mutex_);
  require_open("layout of");
  footer_.layout = std::move(json);
}

void HostImage::seal(std::size_t num_threads, Progress const& progress) {
  std::lock_guard lock(mutex_);
  require_open("seal of");
  if (num_writers_ != 0) {
    throw LifecycleError(concat("seal of image '", name_, "': a store into it is in flight"));
  }
  footer_.checksums = compute(num_threads, progress);
  sealed_ = true;
}

void HostImage::seal_as(ImageFooter footer) {
  std::lock_guard lock(mutex_);
  require_open("seal of");
  footer_ = std::move(footer);
  sealed_ = true;
}

void HostImage::verify(std::size_t num_threads, Progress const& progress) const {
  auto expected = checksums();
  auto bad = describe_bad_chunks(expected, compute(num_threads, progress), size_bytes());
  if (!bad.empty()) throw IntegrityError(concat("image '", name_, "': ", bad));
}

std::vector<std::uint32_t> HostImage::checksums() const {
  std::lock_guard lock(mutex_);
  require_sealed();
  return footer_.checksums;
}

ImageFooter HostImage::footer() const {
  std::lock_guard lock(mutex_);
  require_sealed();
  return footer_;
}

std::unique_ptr<HostImage::Writer> HostImage::write() {
  std::lock_guard lock(mutex_);
  require_open("store into");
  return std::make_unique<Writer>(shared_from_this());
}

}  // namespace aegaeon
