// Every call of the driver that an operation makes fails: the n-th for every n; once, for good, and
// with a second failure on the way back; by four codes. After a single failure all is as before,
// and the operation works when it is tried again. After any, the ledger holds, a neighbour's bytes
// and its next operation are untouched, what was quarantined heals, and nothing is left when all is
// closed.
#include <unistd.h>

#include <functional>
#include <optional>

#include "tests/support.hpp"
#include "transfer/host_pool.hpp"
#include "transfer/prefetcher.hpp"
#include "vmm/alias_set.hpp"
#include "vmm/copy.hpp"
#include "vmm/shared_region.hpp"
#include "vmm/torch_pool.hpp"

// Where the program is loaded: call sites are printed as offsets from it.
extern "C" char const __executable_start;

namespace aegaeon::tests {
namespace {

constexpr std::size_t kUnit = 2 * kPage;  // every handle size that is swept divides it
constexpr std::size_t kCapacity = 16 * kUnit, kRegion = 8 * kUnit, kImage = 4 * kUnit;

struct Variant {
  std::size_t handle_bytes = kPage;
  bool poison = false;
  bool move_page_tables = true;
  std::uint32_t seed = 0;
};

// A neighbour with bytes to lose, and what the operations work on.
struct World {
  explicit World(Variant const& variant)
      : driver(std::make_shared<FaultyDriver>(
            make_host_driver(2 * kCapacity, variant.move_page_tables, kPage))),
        random(variant.seed),
        arena(
            std::make_shared<Arena>(driver, kCapacity, variant.handle_bytes, variant.poison, true)),
        stream(driver),
        neighbour(arena->reserve(kUnit, "neighbour", "kv")),
        a(arena->reserve(kRegion, "a", "weights")),
        b(arena->reserve(kRegion, "b", "weights")),
        image(std::make_shared<HostImage>(driver, kImage, "image")),
        prefetcher(new Prefetcher(driver, {.chunk_bytes = kPage, .depth = 2})) {
    {  // all free memory is large handles, so that a tail has to convert one
      auto filler = arena->reserve(kCapacity, "filler", "t");
      filler->map(0, std::nullopt);
    }
    neighbour->map(0, std::nullopt);
    std::memset(pointer(neighbour->address()), 0x4E, kUnit);
    // With holes, heads and tails.
    a->map(kPage, kPage, Contents::kZero);
    a->map(2 * kUnit, kUnit + kPage, Contents::kZero, variant.seed % 2 == 1);
    a->open_window();
    for (auto const& range : a->mapped_ranges()) {
      std::memset(pointer(a->address() + range.offset_bytes), 0xA1, range.size_bytes);
    }
    a->close_window();
    b->map(0, 2 * kUnit);
    std::memset(pointer(b->address()), 0xB2, 2 * kUnit);
    std::memset(image->data(), 0x11, kImage);
    driver->reset();
  }

  // What must not change when an operation fails.
  [[nodiscard]] std::string state() const {
    auto stats = arena->stats();
    std::string text = concat(stats.free_bytes, " ", stats.quarantined_bytes);
    for (auto const& [who, bytes] : stats.owners) {
      text += concat(";", who.first, ",", who.second, "=", bytes);
    }
    for (auto const& region : {a, b}) {
      text += concat(" ", region->closed(), region->address(), region->size_bytes());
      for (auto const& range : region->mapped_ranges()) {
        text += concat(",", range.offset_bytes, "+", range.size_bytes);
      }
      for (auto const& range : region->read_only_ranges()) {
        text += concat(",ro", range.offset_bytes, "+", range.size_bytes);
      }
    }
    if (set) text += " slot of " + set->owner();
    return text;
  }

  [[nodiscard]] std::size_t num_wrong(Region const& region, std::byte value) const {
    std::size_t sum = 0;
    for (auto const& range : region.mapped_ranges()) {
      auto const* bytes = pointer(region.address() + range.offset_bytes);
      for (std::size_t i = 0; i < range.size_bytes; ++i) sum += bytes[i] != value;
    }
    return sum;
  }

  void close() {
    check(*driver, driver->stream_synchronize(stream.id()), "stream_synchronize");
    image.reset();
    pool_memory.reset();
    pool.reset();
    shared.reset();
    for (auto const& handle : exported) ::close(handle.fd);
    exported.clear();
    torch_piece.reset();
    torch_pool.reset();
    hold.reset();
    ticket.reset();
    if (prefetcher) prefetcher->close();
    prefetcher.reset();
    slots.clear();
    if (set) set->close(false);
    set.reset();
    made.reset();
    arena->close();
    a.reset();
    b.reset();
    neighbour.reset();
    arena.reset();
  }

  std::shared_ptr<FaultyDriver> driver;
  Random random;
  std::shared_ptr<Arena> arena;
  Stream stream;
  std::shared_ptr<Region> neighbour, a, b;
  std::shared_ptr<HostImage> image;
  std::unique_ptr<Prefetcher> prefetcher;
  // By the operations:
  std::shared_ptr<Region> made;
  std::shared_ptr<AliasSet> set;
  std::vector<std::shared_ptr<Region>> slots;
  std::shared_ptr<Ticket> ticket;
  std::unique_ptr<Region::Hold> hold;
  std::shared_ptr<HostPool> pool;
  std::optional<HostMemory> pool_memory;
  std::vector<SharedHandle> exported;
  std::shared_ptr<SharedRegion> shared;
  std::shared_ptr<TorchPool> torch_pool;
  std::optional<TorchPool::Piece> torch_piece;
  std::vector<std::byte> buffer = std::vector<std::byte>(64);
};

std::optional<Clock::time_point> soon() {
  return Clock::now() + std::chrono::seconds(10);
}

void finish(World& world) {
  require(world.ticket->wait_until(soon()), "no wait is longer than 10 s");
  auto ticket = std::exchange(world.ticket, nullptr);
  ticket->check();
}

void submit(World& world, Direction direction, TransferOptions options = {}) {
  options.order = {{2 * kUnit, 0, kUnit}, {kPage, 2 * kUnit + 7, 100}};
  world.ticket = world.prefetcher->submit(direction, world.image, world.a, std::move(options));
}

void make_set(World& world, bool debug) {
  std::vector<std::string> names{"x", "y", "z"};
  world.set = AliasSet::create(world.arena, 2 * kUnit, names, "t", debug);
}

void write_to_slot(World& world) {
  auto region = world.set->region("x");
  check(*world.driver,
        world.driver->memset_async(region->address(), 0xC3, kUnit, world.stream.id()),
        "memset_async");
  region->record(world.stream.id());
}

void used_by_the_device(World& world, Region& region) {
  world.a->open_window();
  check(*world.driver,
        world.driver->memset_async(region.address() + 2 * kUnit, 0xA1, kPage, world.stream.id()),
        "memset_async");
  region.record(world.stream.id());
}

// A fill that nobody could wait for.
void leave_a_fill(World& world) {
  make_set(world, false);
  world.driver->fail_call(1, "stream_synchronize", 719, true);
  try {
    world.set->give("y", Contents::kZero);
  } catch (DriverError const&) {
  }
  world.driver->reset();
}

// Copies that nobody could wait for: the prefetcher keeps what they touch.
void leave_copies(World& world) {
  world.a->open_window();
  world.driver->fail_call(3, std::nullopt, 719, true);
  submit(world, Direction::kLoad);
  require(world.ticket->wait_until(soon()), "no wait is longer than 10 s");
  world.ticket.reset();
  world.driver->reset();
}

// Work that nobody could wait for when its region was dropped.
void leave_work(World& world) {
  world.made = world.arena->reserve(kUnit, "made", "t");
  world.made->map(0, std::nullopt);
  check(*world.driver,
        world.driver->memset_async(world.made->address(), 1, kPage, world.stream.id()),
        "memset_async");
  world.made->record(world.stream.id());
  check(*world.driver, world.driver->stream_synchronize(world.stream.id()), "stream_synchronize");
  world.driver->fail_call(1, "event_synchronize", 719, true);
  world.made.reset();
  require(world.arena->stats().quarantined_bytes == kUnit, "its memory is kept from all");
  world.driver->reset();
}

// An arena of its own that ends, in the worst case with all of that unanswered.
void drop_an_arena(World& world) {
  auto arena = std::make_shared<Arena>(world.driver, 2 * kUnit, kPage);
  auto set = AliasSet::create(arena, kUnit, {"x", "y"}, "t", false);
  set->give("y", Contents::kZero);
  set->region("y")->record(world.stream.id());
  check(*world.driver, world.driver->stream_synchronize(world.stream.id()), "stream_synchronize");
  set.reset();
}

void nothing(World&) {}

struct Operation {
  char const* name;
  std::function<void(World&)> prepare;
  std::function<void(World&)> run;
  // One failure leaves all as before, and the operation can be tried again.
  bool restores = true;
  // The first failure may be answered otherwise than by an error: another way, or a report.
  bool absorbs = false;
  bool writes_a = false;
  bool keeps = false;  // what the device has never answered for, for good
};

std::vector<Operation> const& operations() {
  static std::vector<Operation> const all{
      {"reserve", nothing, [](World& w) { w.made = w.arena->reserve(kUnit, "new", "t"); }},
      {"map with head and tail", nothing, [](World& w) { w.a->map(4 * kUnit + kPage, 3 * kUnit); }},
      {"map poisoned", nothing, [](World& w) { w.a->map(4 * kUnit, kUnit, Contents::kPoison); }},
      {"map read-only", nothing,
       [](World& w) { w.a->map(4 * kUnit, kUnit + kPage, Contents::kZero, true); }},
      {"unmap all", nothing, [](World& w) { w.a->unmap(0, std::nullopt); }},
      {"unmap a run", nothing, [](World& w) { w.a->unmap(2 * kUnit, kUnit); }},
      {"unmap after the device's work", [](World& w) { used_by_the_device(w, *w.a); },
       [](World& w) { w.a->unmap(2 * kUnit, kUnit); }},
      {"close a region", nothing, [](World& w) { w.a->close(); }},
      {"evict and map", nothing,
       [](World& w) {
         w.arena->commit({{.kind = Step::Kind::kUnmap, .region = w.b, .size_bytes = {}},
                          {.region = w.a, .offset_bytes = 4 * kUnit, .size_bytes = 4 * kUnit}});
       }},
      {"exchange", nothing,
       [](World& w) {
         w.arena->commit({{.kind = Step::Kind::kUnmap, .region = w.a, .size_bytes = {}},
                          {.kind = Step::Kind::kUnmap, .region = w.b, .size_bytes = {}},
                          {.region = w.a, .size_bytes = kUnit + kPage},
                          {.region = w.b, .size_bytes = 6 * kUnit, .contents = Contents::kPoison}});
       }},
      {"take all",
       [](World& w) {
         w.b->map(2 * kUnit, 6 * kUnit);
         std::memset(pointer(w.b->address()), 0xB2, kRegion);
       },
       [](World& w) {
         w.arena->commit({{.kind = Step::Kind::kUnmap, .region = w.b, .size_bytes = {}},
                          {.region = w.a, .offset_bytes = 4 * kUnit, .size_bytes = 4 * kUnit}});
       }},
      {"protect", [](World& w) { w.a->protect(0, std::nullopt, false); },
       [](World& w) { w.a->protect(0, std::nullopt, true); }},
      {"open a window", [](World& w) { w.a->protect(0, std::nullopt, true); },
       [](World& w) { w.a->open_window(); }},
      {"close a window",
       [](World& w) {
         w.a->protect(0, std::nullopt, true);
         w.a->open_window();
       },
       [](World& w) { w.a->close_window(); }, false},
      {"record", nothing, [](World& w) { w.a->record(w.stream.id()); }},
      {"make an alias set", nothing, [](World& w) { make_set(w, false); }},
      {"make an alias set to debug", nothing, [](World& w) { make_set(w, true); }},
      {"give", [](World& w) { make_set(w, false); },
       [](World& w) { w.set->give("y", Contents::kZero); }},
      {"give after the device's work",
       [](World& w) {
         make_set(w, false);
         write_to_slot(w);
       },
       [](World& w) { w.set->give("z", Contents::kPoison); }},
      {"give to debug", [](World& w) { make_set(w, true); },
       [](World& w) { w.set->give("y", Contents::kZero); }},
      {"give after an unfinished fill", leave_a_fill,
       [](World& w) { w.set->give("z", Contents::kZero); }, true, true},
      {"drop an alias set after an unfinished fill", leave_a_fill, [](World& w) { w.set.reset(); },
       false, true},
      {"drop a recorded alias set",
       [](World& w) {
         make_set(w, false);
         write_to_slot(w);
         check(*w.driver, w.driver->stream_synchronize(w.stream.id()), "stream_synchronize");
       },
       [](World& w) { w.set.reset(); }, false, true},
      {"close an alias set", [](World& w) { make_set(w, false); },
       [](World& w) { w.set->close(false); }, false},
      {"drop an alias set", [](World& w) { make_set(w, false); }, [](World& w) { w.set.reset(); },
       false, true},
      {"drop a recorded region",
       [](World& w) {
         used_by_the_device(w, *w.a);
         check(*w.driver, w.driver->stream_synchronize(w.stream.id()), "stream_synchronize");
       },
       [](World& w) { w.a.reset(); }, false, true},
      {"ask about unfinished work", leave_work,
       [](World& w) { static_cast<void>(w.arena->check({})); }, false, true},
      {"close the arena with unfinished work",
       [](World& w) {
         w.prefetcher->close();
         w.prefetcher.reset();
         for (auto const& region : {w.a, w.b, w.neighbour}) region->close();
         leave_work(w);
       },
       [](World& w) { w.arena->close(); }, false, true},
      {"drop an arena", nothing, drop_an_arena, false, true, false, true},
      {"load", [](World& w) { w.a->open_window(); },
       [](World& w) {
         submit(w, Direction::kLoad);
         finish(w);
       },
       true, false, true},
      {"load after a stream, seen by one", [](World& w) { w.a->open_window(); },
       [](World& w) {
         submit(w, Direction::kLoad, {.after = w.stream.id()});
         if (w.ticket->wait_submitted_until(kPage, soon())) {
           w.ticket->wait_on_stream(w.stream.id(), kPage);
         }
         finish(w);
       },
       true, true, true},  // the end of the gate's event is only reported
      {"store", nothing,
       [](World& w) {
         submit(w, Direction::kStore);
         finish(w);
       }},
      {"cancel", [](World& w) { w.a->open_window(); },
       [](World& w) {
         submit(w, Direction::kLoad);
         w.ticket->cancel();
         require(w.ticket->wait_until(soon()), "no wait is longer than 10 s");
         w.ticket.reset();
       },
       false, true, true},
      {"open a prefetcher", [](World& w) { w.prefetcher.reset(); },
       [](World& w) {
         w.prefetcher.reset(new Prefetcher(w.driver, {.chunk_bytes = kPage, .depth = 3}));
       }},
      {"close a prefetcher", nothing, [](World& w) { w.prefetcher->close(); }, false},
      {"close a prefetcher after unfinished copies", leave_copies,
       [](World& w) { w.prefetcher->close(); }, false, true, true},
      {"allocate an image", [](World& w) { w.image.reset(); },
       [](World& w) { w.image = std::make_shared<HostImage>(w.driver, 999, "image"); }},
      {"drop an image", nothing, [](World& w) { w.image.reset(); }, false, true},
      {"make a host pool", nothing,
       [](World& w) {
         HostMemoryOptions options;
         options.piece_bytes = std::size_t{64} << 10;
         w.pool = std::make_shared<HostPool>(w.driver, std::size_t{192} << 10, options);
         w.pool_memory = w.pool->allocate(1, "one");
         w.pool_memory.reset();
         w.pool->close();
         w.pool.reset();
       },
       true, true},
      {"export and open", nothing,
       [](World& w) {
         w.exported = w.b->export_handles();
         w.shared = std::make_shared<SharedRegion>(w.driver, 2 * kUnit, w.exported, true);
         w.shared->close(false);
         for (auto const& handle : w.exported) ::close(handle.fd);
         w.exported.clear();
         w.shared.reset();
       },
       false, true},
      {"allocate for torch",
       [](World& w) {
         w.made = w.arena->reserve(kRegion, "torch", "t");
         w.torch_pool = std::make_shared<TorchPool>(std::vector{w.made});
       },
       [](World& w) {
         w.torch_piece = w.torch_pool->allocate(kUnit + 5);
         if (!w.torch_piece) throw DriverError(w.torch_pool->stats().last_failure, "", 1, 0);
       },
       true, true},  // a shortage is answered by another way

      {"free for torch",
       [](World& w) {
         w.made = w.arena->reserve(kRegion, "torch", "t");
         w.torch_pool = std::make_shared<TorchPool>(std::vector{w.made});
         w.torch_piece = w.torch_pool->allocate(kUnit + 5);
       },
       [](World& w) {
         if (w.torch_piece) w.torch_pool->free(*std::exchange(w.torch_piece, {}), w.stream.id());
         static_cast<void>(w.torch_pool->trim());
       },
       false, true},
      {"copy in and out", [](World& w) { w.a->open_window(); },
       [](World& w) {
         constexpr std::size_t kBytes = 64;
         auto here = reinterpret_cast<Address>(w.buffer.data());
         auto there = w.a->address() + 2 * kUnit;
         copy_out(*w.driver, w.stream, {.address = here}, there, kBytes);
         copy_in(*w.driver, w.stream, there, {.address = here}, kBytes);
         copy_in(*w.driver, w.stream, there, {w.b->address(), true}, kBytes);
         copy_out(*w.driver, w.stream, {w.b->address(), true}, there, kBytes);
       },
       true, false, true},
      {"close the arena",
       [](World& w) {
         w.prefetcher->close();
         w.prefetcher.reset();
         w.a->unmap(2 * kUnit, kUnit);
       },
       [](World& w) { w.arena->close(); }, false},
  };
  return all;
}

enum class Mode { kOnce, kForGood, kOnTheWayBack, kWayBackForGood };

struct Failure {
  std::uint64_t n = 1;
  Mode mode = Mode::kOnce;
  std::uint64_t again = 0;  // on the way back: that many calls later
  Result code = 1;
};

class Sweep {
 public:
  std::size_t num_runs = 0;
  std::map<std::pair<std::string, std::uintptr_t>, bool> sites;  // whether it has ever failed

  void all(Variant const& variant, std::size_t most_runs) {
    for (auto const& operation : operations()) {
      for (Result code : {1, 2, 719, 801}) {
        if (num_runs >= most_runs) return;
        for (std::uint64_t n = 1;; ++n) {
          require(n < 300, concat(operation.name, ": it never runs out of calls"));
          if (!run(operation, variant, {n, Mode::kOnce, 0, code})) break;
          run(operation, variant, {n, Mode::kForGood, 0, code});
          // One code is enough for what the way back does with it.
          if (code != 719) continue;
          for (std::uint64_t again = 1; again <= 8; ++again) {
            if (!run(operation, variant, {n, Mode::kOnTheWayBack, again, code})) break;
            run(operation, variant, {n, Mode::kWayBackForGood, again, code});
          }
        }
      }
    }
  }

 private:
  // False: there was no such call.
  bool run(Operation const& operation, Variant const& variant, Failure const& failure) {
    try {
      return attempt(operation, variant, failure);
    } catch (std::exception const& error) {
      throw std::logic_error(concat("'", operation.name, "', call ", failure.n, " fails with ",
                                    failure.code, ", mode ", static_cast<int>(failure.mode), "+",
                                    failure.again, ", handles of ", variant.handle_bytes, ", seed ",
                                    variant.seed, ": ", error.what()));
    }
  }

  bool attempt(Operation const& operation, Variant const& variant, Failure const& failure) {
    World world(variant);
    operation.prepare(world);
    auto before = world.state();
    auto before_live = live_objects(*world.driver);
    auto& driver = *world.driver;
    driver.reset();
    driver.fail_call(failure.n, std::nullopt, failure.code, failure.mode == Mode::kForGood);
    if (failure.again != 0) {
      driver.also_fail_call(failure.n + failure.again, failure.mode == Mode::kWayBackForGood);
    }
    bool threw = false, lost = false, quarantined = false;
    try {
      operation.run(world);
    } catch (DriverError const& error) {
      threw = true;
      lost = !error.lost_contents.empty();
      quarantined = !error.quarantined.empty();
    }
    std::uint64_t num_calls = 0;
    for (auto const& [call, count] : driver.calls()) num_calls += count;
    driver.reset();
    bool single = failure.mode == Mode::kOnce;
    bool fired = num_calls >= failure.n;
    ++num_runs;
    require_ledger(*world.arena);
    require(world.neighbour->closed() || world.num_wrong(*world.neighbour, std::byte{0x4E}) == 0,
            "a neighbour's bytes are its own");
    require(threw || !fired || operation.absorbs, "a call that fails does not go unnoticed");
    require(!threw || fired, "what has not failed is not reported");
    if (single && threw && operation.restores) {
      require(!quarantined, "one failure quarantines nothing");
      require(world.state() == before,
              concat("all is as before: ", before, " and then ", world.state()));
      require(live_objects(driver) == before_live, "nothing is left over");
      if (!operation.writes_a && !lost) {
        require(world.num_wrong(*world.a, std::byte{0xA1}) == 0, "its own bytes are still there");
        require(world.num_wrong(*world.b, std::byte{0xB2}) == 0, "and those of the other");
      }
    }
    if (threw && (operation.restores ? single : !operation.absorbs)) {
      if (operation.name != std::string_view("close a window")) operation.run(world);
    }
    if (!world.neighbour->closed()) go_on(world);
    world.close();
    require_nothing_left(driver, operation.keeps);
    for (auto const& [address, site] : driver.call_sites()) {
      auto offset = reinterpret_cast<std::uintptr_t>(address) -
                    reinterpret_cast<std::uintptr_t>(&__executable_start);
      sites[{site.call, offset}] |= site.num_failures != 0;
    }
    return num_calls >= failure.n + failure.again;
  }

  // What the end of an object could not give back it can only report.
  static void require_nothing_left(FaultyDriver const& driver, bool keeps) {
    static std::map<std::string_view, char const*> const kUndone{
        {"mem_release", "handles"},          {"mem_unmap", "mappings"},
        {"address_free", "reservations"},    {"host_free", "host_allocations"},
        {"stream_destroy", "streams"},       {"event_destroy", "events"},
        {"host_unregister", "registrations"}};
    std::map<std::string, std::int64_t> refused;
    for (auto const& [address, site] : driver.call_sites()) {
      std::string_view call = site.call;
      bool asks = call == "event_query" || call == "stream_synchronize";
      if (keeps && asks && site.num_failures != 0) {
        refused["mappings"] += 2 * kUnit / kPage;  // of both regions of a set
        refused["events"] += 1;
      }
      auto found = kUndone.find(call);
      if (found != kUndone.end()) {
        refused[found->second] += static_cast<std::int64_t>(site.num_failures);
      }
    }
    // What stays mapped keeps its address and its memory.
    refused["reservations"] += refused["mappings"];
    refused["handles"] += refused["mappings"];
    auto live = driver.live();
    live["streams"] -= 1;  // the world's own
    for (auto const& [kind, count] : live) {
      require(count >= 0 && count <= refused[kind],
              concat("no ", kind, " left but those refused, found ", count));
    }
  }

  // Without what the arena keeps for later: handles, events, a stream.
  static std::map<std::string, std::int64_t> live_objects(FaultyDriver const& driver) {
    auto live = driver.live();
    for (auto const* kept : {"handles", "events", "streams"}) live.erase(kept);
    return live;
  }

  // The next operation of somebody else works, and all heals.
  static void go_on(World& world) {
    world.neighbour->unmap(0, std::nullopt);
    world.neighbour->map(0, std::nullopt);
    std::memset(pointer(world.neighbour->address()), 0x4E, kUnit);
    require_ledger(*world.arena);
    require(world.arena->stats().quarantined_bytes == 0, "what was quarantined heals");
  }
};

}  // namespace

void fault_sweep(std::size_t num_runs) {
  Sweep sweep;
  for (std::uint32_t seed = 0; sweep.num_runs < num_runs; ++seed) {
    sweep.all({.handle_bytes = (seed % 2 == 0 ? 2 : 1) * kPage,
               .poison = seed % 4 >= 2,
               .move_page_tables = seed % 3 != 2,
               .seed = seed},
              seed == 0 ? std::numeric_limits<std::size_t>::max() : num_runs);
  }
  std::printf("        %zu runs over %zu operations\n", sweep.num_runs, operations().size());
  for (auto const& [site, failed] : sweep.sites) {
    if (failed) std::printf("site %s %#zx\n", site.first.c_str(), site.second);
  }
}

}  // namespace aegaeon::tests
