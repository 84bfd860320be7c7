// Owners of a stream and of an event, and what is asked of a stream that is somebody else's.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "driver/driver.hpp"
#include "error.hpp"

namespace aegaeon {

class Stream {
 public:
  explicit Stream(std::shared_ptr<Driver> driver) : driver_(std::move(driver)) {
    check(*driver_, driver_->stream_create(&id_), "stream_create");
    live_ = true;
  }
  ~Stream() { report(destroy(), "stream_destroy"); }
  Stream(Stream const&) = delete;  // one stream, one owner
  Stream& operator=(Stream const&) = delete;

  // The undo call, for those who can act on its failure.
  Result destroy() noexcept {
    if (!live_) return kSuccess;
    Result result = driver_->stream_destroy(id_);
    live_ = result != kSuccess;
    return result;
  }
  [[nodiscard]] StreamId id() const noexcept { return id_; }

 private:
  std::shared_ptr<Driver> driver_;
  StreamId id_ = 0;
  bool live_ = false;
};

class Event {
 public:
  explicit Event(std::shared_ptr<Driver> driver) : driver_(std::move(driver)) {
    check(*driver_, driver_->event_create(&id_), "event_create");
    live_ = true;
  }
  ~Event() { report(destroy(), "event_destroy"); }
  Event(Event const&) = delete;  // one event, one owner
  Event& operator=(Event const&) = delete;

  Result destroy() noexcept {
    if (!live_) return kSuccess;
    Result result = driver_->event_destroy(id_);
    live_ = result != kSuccess;
    return result;
  }
  [[nodiscard]] EventId id() const noexcept { return id_; }

 private:
  std::shared_ptr<Driver> driver_;
  EventId id_ = 0;
  bool live_ = false;
};

// In a stream that is being captured, an event of ours would become part of the graph, or break the
// capture. Throws LifecycleError, which says what to do instead.
inline void require_no_capture(Driver& driver, StreamId stream, std::string const& instead) {
  bool capturing = false;
  check(driver, driver.stream_is_capturing(&capturing, stream), "stream_is_capturing");
  if (capturing) {
    throw LifecycleError(concat("the stream is being captured into a graph: ", instead));
  }
}

}  // namespace aegaeon
