// Quarantine: what could not be given back. Mappings that the driver did not unmap, or that the
// device may still be working on, and address ranges that it did not free. Neither owned nor free;
// tried again at every later call of the arena. Not thread-safe: the arena's mutex guards it.
#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <vector>

#include "driver/driver.hpp"
#include "driver/stream.hpp"
#include "vmm/handle_pool.hpp"
#include "vmm/handles.hpp"
#include "vmm/slot_map.hpp"

namespace aegaeon {

using Events = std::vector<std::shared_ptr<Event>>;

// The work that regions have recorded and nobody could wait for; shared by all their mappings.
// Events that are over are taken out.
struct UnfinishedWork {
  Events events;
};

class Quarantine {
 public:
  // Handles go to the pool, and events to the free ones, when nothing stands against it any more.
  Quarantine(std::shared_ptr<Driver> driver, HandlePool& pool, Events& free_events);
  // What may still be written to is kept for good: nobody may get it.
  ~Quarantine();
  Quarantine(Quarantine const&) = delete;  // owns mappings
  Quarantine& operator=(Quarantine const&) = delete;

  // filling: a fill that nobody could wait for may still write to it.
  void add(Mapping mapping, bool filling, std::shared_ptr<UnfinishedWork> work = nullptr);
  // An address range that is not used any more, but for mappings that are here.
  void retire(std::shared_ptr<Reservation> range);
  // The device's answer about all unconfirmed fills.
  void fills_are_over(Result result) noexcept;
  // Asks the device and the driver again; waits for nothing.
  void heal();

  // Of the work that is not over: to be waited for without the arena's mutex.
  [[nodiscard]] Events unfinished() const;
  // Throws the last answer of the driver when a handle still occupies a part of the range.
  void require_clear(Reservation const& reservation, Range const& range) const;
  // The same for all that is here.
  void require_empty() const;
  // Counted once for each handle, wherever it is stuck.
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  struct Held {
    Mapping mapping;
    bool filling = false;
    std::shared_ptr<UnfinishedWork> work;
    Result last = kSuccess;  // of the last attempt, which was this call
    char const* call = "mem_unmap";
  };
  struct Retired {
    std::shared_ptr<Reservation> range;
    Result last = kSuccess;
  };

  void require(Held const& held) const;
  Result ask(UnfinishedWork& work);
  bool give_back(Held& held);

  std::shared_ptr<Driver> const driver_;
  HandlePool& pool_;
  Events& free_events_;
  std::size_t bytes_ = 0;
  std::list<Held> held_;
  std::list<Retired> retired_;
};

}  // namespace aegaeon
