#include "vmm/copy.hpp"

#include "error.hpp"

namespace aegaeon {
namespace {

void require_apart(Address one, Address other, std::size_t bytes) {
  if (one < other + bytes && other < one + bytes) {
    throw std::invalid_argument(concat("a copy of ", bytes, " bytes between memory that overlaps"));
  }
}

void finish(Driver& driver, Stream const& stream, Result result, char const* call,
            std::size_t bytes) {
  check(driver, result, call, bytes);
  result = driver.stream_synchronize(stream.id());
  // The caller takes his memory back, so whether the copy is over is worth asking twice.
  if (result != kSuccess) static_cast<void>(driver.stream_synchronize(stream.id()));
  check(driver, result, "stream_synchronize", bytes);
}

}  // namespace

void copy_in(Driver& driver, Stream const& stream, Address to, OtherMemory from,
             std::size_t bytes) {
  require_apart(to, from.address, bytes);
  if (from.on_device) {
    auto result = driver.memcpy_d2d_async(to, from.address, bytes, stream.id());
    finish(driver, stream, result, "memcpy_d2d_async", bytes);
  } else {
    auto const* source = reinterpret_cast<void const*>(from.address);
    auto result = driver.memcpy_h2d_async(to, source, bytes, stream.id());
    finish(driver, stream, result, "memcpy_h2d_async", bytes);
  }
}

void copy_out(Driver& driver, Stream const& stream, OtherMemory to, Address from,
              std::size_t bytes) {
  require_apart(to.address, from, bytes);
  if (to.on_device) {
    auto result = driver.memcpy_d2d_async(to.address, from, bytes, stream.id());
    finish(driver, stream, result, "memcpy_d2d_async", bytes);
  } else {
    auto* target = reinterpret_cast<void*>(to.address);
    auto result = driver.memcpy_d2h_async(target, from, bytes, stream.id());
    finish(driver, stream, result, "memcpy_d2h_async", bytes);
  }
}

}  // namespace aegaeon
