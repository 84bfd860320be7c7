// Errors of the native part, and the two ways a driver result becomes one: check() throws,
// report() is for destructors. A caller's mistake is std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdio>
#include <memory>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "driver/driver.hpp"

namespace aegaeon {

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

// A part of a region, by its names.
struct RegionRange {
  std::string owner;
  std::string tag;
  std::size_t offset_bytes = 0;
  std::size_t size_bytes = 0;
};

struct DriverError : Error {
  DriverError(std::string const& message, std::string call_, int code_, std::size_t bytes_)
      : Error(message), call(std::move(call_)), code(code_), bytes(bytes_) {}
  std::string call;
  int code;
  std::size_t bytes;
  // Where the way back failed too. Empty: all is as before.
  std::vector<RegionRange> quarantined;    // no longer mapped, for the driver refused
  std::vector<RegionRange> lost_contents;  // the bytes are gone, mapped or not
};

struct Shortage;

struct OutOfMemory : DriverError {
  using DriverError::DriverError;
  std::shared_ptr<Shortage const> shortage;  // null: the device itself is out of memory
};

struct LifecycleError : Error {
  using Error::Error;
};

struct IntegrityError : Error {
  using Error::Error;
};

// A system call on a file failed; an OSError of that number in Python.
struct FileError : Error {
  FileError(std::string const& action_, int code_, std::string path_)
      : Error(action_ + " " + path_ + ": " + std::generic_category().message(code_)),
        action(action_),
        code(code_),
        path(std::move(path_)) {}
  std::string action;
  int code;
  std::string path;
};

struct TransferCancelled : Error {
  using Error::Error;
};

template <typename... Parts>
std::string concat(Parts const&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

inline std::string human_bytes(std::size_t bytes) {
  static constexpr char const* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  if (bytes < 1024) return concat(bytes, " B");
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  for (; value >= 1024 && unit < 3; ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, "%.4g %s", value, kUnits[unit]);
  return text;
}

// Message: call, bytes, device, meaning of the code, place.
inline void check(Driver const& driver, Result result, char const* call, std::size_t bytes = 0,
                  std::source_location where = std::source_location::current()) {
  if (result == kSuccess) return;
  std::string file = where.file_name();
  auto message = concat(call, bytes ? concat(" of ", human_bytes(bytes)) : "", " failed on ",
                        driver.name(), ": ", driver.describe(result), " (code ", result, ") [",
                        file.substr(file.find_last_of('/') + 1), ":", where.line(), "]");
  if (result == kDriverOutOfMemory) throw OutOfMemory(message, call, result, bytes);
  throw DriverError(message, call, result, bytes);
}

// A destructor cannot throw, and must not be silent: something is left behind on the device.
inline void report(Result result, char const* call) noexcept {
  if (result == kSuccess) return;
  std::fprintf(stderr, "aegaeon_kernels: %s failed with code %d during cleanup\n", call, result);
}

}  // namespace aegaeon
