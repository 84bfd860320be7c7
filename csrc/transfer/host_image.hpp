// HostImage: bytes in host memory in exactly the layout they have on the device, so that moving
// them there is a plain copy. Page-locked when the driver can.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver/driver.hpp"

namespace aegaeon {

class HostImage : public std::enable_shared_from_this<HostImage> {
 public:
  static constexpr std::size_t kChunkBytes = std::size_t{8} << 20;  // of one checksum

  // The name is for messages. Throws DriverError, OutOfMemory.
  HostImage(std::shared_ptr<Driver> driver, std::size_t size_bytes, std::string name);
  ~HostImage();
  HostImage(HostImage const&) = delete;  // owns the memory
  HostImage& operator=(HostImage const&) = delete;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return size_bytes_; }
  [[nodiscard]] std::string const& name() const noexcept { return name_; }
  [[nodiscard]] bool pinned() const noexcept { return driver_->kind() == DeviceKind::kCuda; }

  // Fixes the contents: a checksum per chunk, and no more stores into it.
  void seal();
  [[nodiscard]] bool sealed() const noexcept { return sealed_; }
  // Throws IntegrityError that names the chunks which are not what was sealed.
  void verify() const;
  [[nodiscard]] std::vector<std::uint32_t> checksums() const;

  // While a Writer lives, the image cannot be sealed. Throws LifecycleError when it is already.
  class Writer {
   public:
    explicit Writer(std::shared_ptr<HostImage> image) : image_(std::move(image)) {
      ++image_->num_writers_;
    }
    ~Writer() { --image_->num_writers_; }
    Writer(Writer const&) = delete;  // one writer, one count
    Writer& operator=(Writer const&) = delete;

   private:
    std::shared_ptr<HostImage> image_;
  };
  std::unique_ptr<Writer> write();

 private:
  [[nodiscard]] std::vector<std::uint32_t> compute() const;

  std::shared_ptr<Driver> const driver_;
  std::size_t const size_bytes_;
  std::string const name_;
  std::byte* data_ = nullptr;
  std::atomic<std::size_t> num_writers_{0};
  mutable std::mutex mutex_;  // guards the checksums
  std::atomic<bool> sealed_{false};
  std::vector<std::uint32_t> checksums_;
};

}  // namespace aegaeon
