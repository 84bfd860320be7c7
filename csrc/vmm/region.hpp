// Region: a stable virtual range that draws on an arena. All public members are safe to call from
// any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "driver/driver.hpp"
#include "driver/stream.hpp"
#include "vmm/handles.hpp"
#include "vmm/quarantine.hpp"
#include "vmm/shared_handle.hpp"
#include "vmm/slot_map.hpp"
#include "vmm/step.hpp"

namespace aegaeon {

class AliasSet;
class Arena;
class Transaction;

class Region : public std::enable_shared_from_this<Region> {
 public:
  // By Arena::reserve.
  Region(std::shared_ptr<Arena> arena, std::uint64_t id, std::size_t size_bytes, std::string owner,
         std::string tag);
  ~Region();
  Region(Region const&) = delete;  // owns an address range
  Region& operator=(Region const&) = delete;

  // Transactions of one step.
  void map(std::size_t offset_bytes, std::optional<std::size_t> size_bytes,
           Contents contents = Contents::kZero, bool read_only = false);
  void unmap(std::size_t offset_bytes, std::optional<std::size_t> size_bytes);
  // Unmaps, and frees the address range, at the latest with the last export. While an export lives
  // it throws LifecycleError, unless told to abandon them.
  void close(bool abandon_views = false);

  // Read-only memory can be written while at least one window is open. A transfer that began in one
  // keeps what it writes writable until it ends, and nothing else.
  void protect(std::size_t offset_bytes, std::optional<std::size_t> size_bytes, bool read_only);
  void open_window();
  void close_window();

  // What the device has been given to do on that stream so far uses the region: the next unmap or
  // close waits for it. Throws LifecycleError while the stream is being captured.
  void record(StreamId stream);

  // While a Hold lives, unmap and close refuse, with its reason.
  class Hold {
   public:
    Hold(std::shared_ptr<Region> region, std::string reason);
    ~Hold() { end(); }
    void end();
    Hold(Hold const&) = delete;  // one hold, one count
    Hold& operator=(Hold const&) = delete;

   private:
    std::shared_ptr<Region> region_;
    std::multiset<std::string>::iterator reason_;
  };
  std::unique_ptr<Hold> hold(std::string reason);

  // before_unmap: for every run of mappings, before anything changes; throwing aborts. after_map:
  // for every run that was mapped, and for those that stay when a transaction fails after
  // before_unmap ran. Both without a lock. A region with hooks lives until it is closed.
  using Hook = std::function<void(Range const&)>;
  std::uint64_t add_hooks(Hook before_unmap, Hook after_map);
  void remove_hooks(std::uint64_t id);

  [[nodiscard]] Address address() const noexcept { return range_->address(); }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return range_->bytes(); }
  [[nodiscard]] std::size_t mapped_bytes() const noexcept { return mapped_bytes_; }
  [[nodiscard]] std::vector<Range> mapped_ranges() const;
  [[nodiscard]] std::vector<Range> read_only_ranges() const;
  [[nodiscard]] std::uint64_t generation() const noexcept { return generation_; }
  [[nodiscard]] bool closed() const noexcept { return closed_; }
  [[nodiscard]] std::string const& owner() const noexcept { return owner_; }
  [[nodiscard]] std::string const& tag() const noexcept { return tag_; }
  [[nodiscard]] std::shared_ptr<Arena> const& arena() const noexcept { return arena_; }

  // While a Use lives, the region's mappings stay: unmap and close refuse.
  class Use {
   public:
    Use(std::shared_ptr<Region> region, std::vector<Range> written);
    ~Use();
    Use(Use const&) = delete;  // one use, one count
    Use& operator=(Use const&) = delete;

   private:
    std::shared_ptr<Region> region_;
    std::vector<Range> written_;  // whole mappings, each once
  };
  // Throws LifecycleError unless every range is mapped and, for one that writes, writable: what is
  // read-only needs an open window, whoever else writes to it just now.
  std::unique_ptr<Use> use(std::vector<Range> const& ranges, bool writes = false);

  // While an Export lives, the address range stays reserved, so that a tensor which outlives the
  // region faults instead of seeing somebody else's memory. Mappings come and go.
  class Export {
   public:
    explicit Export(std::shared_ptr<Region> region) : region_(std::move(region)) {
      ++region_->num_exports_;
    }
    ~Export() { --region_->num_exports_; }
    Export(Export const&) = delete;  // one export, one count
    Export& operator=(Export const&) = delete;

   private:
    std::shared_ptr<Region> region_;
  };
  std::unique_ptr<Export> export_range(Range const& range);

  // New descriptors, which the caller closes, of all that is mapped, in order. The caller holds the
  // region. Throws std::invalid_argument (the arena is not exportable), LifecycleError (closed;
  // nothing is mapped), DriverError.
  std::vector<SharedHandle> export_handles();

 private:
  friend class AliasSet;
  friend class Arena;
  friend class Notices;
  friend class Transaction;
  using Lock = std::unique_lock<std::mutex>;

  struct Hooks {
    Hook before_unmap;
    Hook after_map;
  };
  // The last record of one stream. Recording again moves the event and the number on.
  struct Recorded {
    std::shared_ptr<Event> event;
    std::uint64_t number = 0;
  };

  // All private members: the arena's mutex is held.
  [[nodiscard]] std::string title() const;
  void wait_for_change(Lock& lock) const;  // by a transaction of another thread
  void require_open(char const* verb) const;
  void require_unused(char const* verb) const;
  void require_no_views(char const* verb) const;
  // Throws unless that is the alias set which it belongs to; null: none.
  void require_part_of(AliasSet const* set, char const* verb) const;
  void require_slot(char const* verb) const;
  // Of the recorded work, giving the lock up; false: there was none. What is recorded meanwhile is
  // for the next round.
  static bool wait_for_events(Lock& lock, std::vector<Region*> const& regions);
  // The same at their end, when nobody else has them any more: takes the mutex, and the events
  // away. What could not be waited for; null: all of it is over.
  static std::shared_ptr<UnfinishedWork> finish_work(Arena& arena,
                                                     std::vector<Region*> const& regions);
  Range checked_range(char const* verb, std::size_t offset_bytes,
                      std::optional<std::size_t> size_bytes) const;
  void require_whole_slots(char const* verb, SlotMap const& slots, Range const& range,
                           bool all_mapped) const;
  [[nodiscard]] std::vector<Range> slots_for(Range const& range) const;
  // The mappings in the range.
  std::pair<Slots::iterator, Slots::iterator> mappings_in(Range const& range);
  Slots extract(Range const& range);
  // Of a range that need not begin or end with a mapping.
  std::pair<Slots::iterator, Slots::iterator> mappings_over(Range const& range);
  [[nodiscard]] Access wanted_access(Mapping const& mapping) const noexcept {
    bool locked = mapping.record.read_only && num_windows_ == 0 && mapping.record.num_writers == 0;
    return locked ? Access::kRead : Access::kReadWrite;
  }
  // Brings the mappings' access to what is wanted. The first failure; the others are still tried.
  Result settle_access(Range const& range) noexcept;
  Result settle_access() noexcept { return settle_access({0, size_bytes()}); }
  void drop_events();

  std::shared_ptr<Arena> const arena_;
  std::uint64_t const id_;
  std::string const owner_;
  std::string const tag_;
  std::shared_ptr<Reservation> range_;  // the arena's in the end
  SlotMap slots_;
  Slots mapped_;
  bool changing_ = false;  // a transaction works on it without the mutex
  AliasSet const* alias_set_ = nullptr;
  bool owns_slot_ = true;  // of its alias set
  std::size_t num_windows_ = 0;
  std::multiset<std::string> holds_;
  std::map<std::uint64_t, std::shared_ptr<Hooks const>> hooks_;
  std::map<StreamId, Recorded> recorded_;
  std::atomic<std::size_t> mapped_bytes_{0};
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<std::size_t> num_uses_{0};
  std::atomic<std::size_t> num_exports_{0};
  std::atomic<bool> closed_{false};
};

}  // namespace aegaeon
