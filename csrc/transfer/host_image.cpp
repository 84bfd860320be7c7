#include "transfer/host_image.hpp"

#include <algorithm>
#include <utility>

#include "error.hpp"
#include "transfer/crc32c.hpp"

namespace aegaeon {

HostImage::HostImage(std::shared_ptr<Driver> driver, std::size_t size_bytes, std::string name)
    : driver_(std::move(driver)), size_bytes_(size_bytes), name_(std::move(name)) {
  if (size_bytes == 0) throw std::invalid_argument("a host image has at least one byte");
  void* memory = nullptr;
  check(*driver_, driver_->host_alloc(&memory, size_bytes), "host_alloc", size_bytes);
  data_ = static_cast<std::byte*>(memory);
}

HostImage::~HostImage() {
  report(driver_->host_free(data_), "host_free");
}

std::vector<std::uint32_t> HostImage::compute() const {
  std::vector<std::uint32_t> sums;
  sums.reserve((size_bytes_ + kChunkBytes - 1) / kChunkBytes);
  for (std::size_t offset = 0; offset < size_bytes_; offset += kChunkBytes) {
    sums.push_back(crc32c(data_ + offset, std::min(kChunkBytes, size_bytes_ - offset)));
  }
  return sums;
}

void HostImage::seal() {
  std::lock_guard lock(mutex_);
  if (sealed_) throw LifecycleError(concat("seal of image '", name_, "': it is sealed already"));
  if (num_writers_ != 0) {
    throw LifecycleError(concat("seal of image '", name_, "': a store into it is in flight"));
  }
  checksums_ = compute();
  sealed_ = true;
}

void HostImage::verify() const {
  auto expected = checksums();
  auto found = compute();
  std::string bad;
  std::size_t num_bad = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == found[i]) continue;
    auto begin = i * kChunkBytes;
    if (++num_bad <= 8) {
      bad += concat(num_bad > 1 ? ", " : "", "chunk ", i, " [", begin, ", ",
                    std::min(begin + kChunkBytes, size_bytes_), ")");
    }
  }
  if (num_bad == 0) return;
  throw IntegrityError(concat("image '", name_, "': ", num_bad, " of ", expected.size(),
                              " chunks differ from what was sealed: ", bad,
                              num_bad > 8 ? ", ..." : ""));
}

std::vector<std::uint32_t> HostImage::checksums() const {
  std::lock_guard lock(mutex_);
  if (!sealed_) throw LifecycleError(concat("image '", name_, "' is not sealed"));
  return checksums_;
}

std::unique_ptr<HostImage::Writer> HostImage::write() {
  std::lock_guard lock(mutex_);
  if (sealed_) throw LifecycleError(concat("store into image '", name_, "': it is sealed"));
  return std::make_unique<Writer>(shared_from_this());
}

}  // namespace aegaeon
