#include "transfer/registration.hpp"

#include <algorithm>
#include <utility>

#include "error.hpp"

namespace aegaeon {

Registration::Registration(std::shared_ptr<Driver> driver, std::byte* data, std::size_t bytes,
                           std::size_t piece_bytes)
    : driver_(std::move(driver)), data_(data), piece_bytes_(piece_bytes) {
  // One after the other: the driver holds a lock of its own throughout.
  while (registered_bytes_ < bytes) {
    auto size = std::min(piece_bytes, bytes - registered_bytes_);
    Result result = driver_->host_register(data + registered_bytes_, size);
    if (result != kSuccess) {
      unregister();
      check(*driver_, result, "host_register", size);
    }
    registered_bytes_ += size;
  }
}

Registration::~Registration() {
  unregister();
}

void Registration::unregister() noexcept {
  for (std::size_t offset = 0; offset < registered_bytes_; offset += piece_bytes_) {
    report(driver_->host_unregister(data_ + offset), "host_unregister");
  }
  registered_bytes_ = 0;
}

}  // namespace aegaeon
