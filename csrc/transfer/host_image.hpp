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
#include "transfer/host_memory.hpp"
#include "transfer/image_footer.hpp"
#include "transfer/parallel.hpp"

namespace aegaeon {

class HostImage : public std::enable_shared_from_this<HostImage> {
 public:
  static constexpr std::size_t kChunkBytes = kImageChunkBytes;  // of one checksum

  // The name is for messages.
  HostImage(HostMemory memory, std::string name);
  // Memory from the driver. Throws DriverError, OutOfMemory.
  HostImage(std::shared_ptr<Driver> driver, std::size_t size_bytes, std::string name);
  HostImage(HostImage const&) = delete;  // owns the memory
  HostImage& operator=(HostImage const&) = delete;

  [[nodiscard]] std::byte* data() const noexcept { return memory_.data; }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return memory_.size_bytes; }
  [[nodiscard]] std::string const& name() const noexcept { return name_; }
  [[nodiscard]] bool pinned() const noexcept { return memory_.pinned; }
  // How much one copy may take from an offset on: it must not touch two pieces of pinned memory.
  [[nodiscard]] std::size_t copyable_bytes(std::size_t offset) const noexcept {
    return memory_.copyable_bytes(offset);
  }

  // JSON that goes with the contents into files; empty at first, fixed by the seal.
  [[nodiscard]] std::string metadata() const;
  [[nodiscard]] std::string layout() const;
  void set_metadata(std::string json);
  void set_layout(std::string json);

  // Fixes the contents: a checksum per chunk, and no more stores into it.
  // Progress is in chunks.
  void seal(std::size_t num_threads = default_num_threads(), Progress const& progress = nullptr);
  // The same for contents whose checksums are known.
  void seal_as(ImageFooter footer);
  [[nodiscard]] bool sealed() const noexcept { return sealed_; }
  // Throws IntegrityError that names the chunks which are not what was sealed.
  void verify(std::size_t num_threads = default_num_threads(),
              Progress const& progress = nullptr) const;
  [[nodiscard]] std::vector<std::uint32_t> checksums() const;
  // Throws LifecycleError unless it is sealed.
  [[nodiscard]] ImageFooter footer() const;

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
  // Both: the mutex is held.
  void require_open(char const* operation) const;
  void require_sealed() const;
  [[nodiscard]] std::vector<std::uint32_t> compute(std::size_t num_threads,
                                                   Progress const& progress) const;

  HostMemory const memory_;
  std::string const name_;
  std::atomic<std::size_t> num_writers_{0};
  mutable std::mutex mutex_;  // guards all that follows
  std::atomic<bool> sealed_{false};
  ImageFooter footer_;  // checksums from the seal on
};

}  // namespace aegaeon
