// Several threads give one slot to each other and use it: whoever has it finds what it wrote there,
// or what its own give() made of it, and is never disturbed.
#include <atomic>
#include <mutex>
#include <thread>

#include "tests/support.hpp"
#include "vmm/alias_set.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kSlot = 4 * kPage, kNumThreads = 4;

void require_refused_while_held(AliasSet& set, std::string const& owner) {
  auto before = set.owner();
  auto hold = set.region(before)->hold("test");
  bool refused = false;
  try {
    set.give(owner, Contents::kPreserve);
  } catch (LifecycleError const&) {
    refused = true;
  }
  require(refused == (before != owner) && set.owner() == before, "what is held is not given away");
}

void run(std::size_t num_gives, bool debug) {
  auto driver = std::make_shared<FaultyDriver>(make_host_driver(4 * kSlot, true, kPage));
  auto arena = std::make_shared<Arena>(driver, 4 * kSlot, 2 * kPage);
  std::vector<std::string> names;
  for (std::size_t i = 0; i < kNumThreads; ++i) names.push_back(concat("owner", i));
  auto set = AliasSet::create(arena, kSlot, names, "t", debug);
  std::mutex turn;  // who has the slot uses it alone
  std::atomic<int> num_failed = 0;
  std::atomic<bool> over = false;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kNumThreads; ++i) {
    threads.emplace_back([&, i] {
      try {
        Random random(static_cast<std::uint32_t>(i));
        Stream stream(driver);
        auto region = set->region(names[i]);
        auto* first = reinterpret_cast<std::uint64_t*>(region->address());
        for (std::size_t step = 0; step < num_gives / kNumThreads; ++step) {
          if (random.one_in(8)) {
            std::lock_guard lock(turn);
            require_refused_while_held(*set, names[i]);
            continue;
          }
          std::lock_guard lock(turn);
          // What it gives itself nobody waits for: its own work may still be under way.
          if (set->owner() == names[i]) {
            check(*driver, driver->stream_synchronize(stream.id()), "stream_synchronize");
          }
          set->give(names[i], Contents::kZero);
          require(*first == 0 || *first == i + 1, "nothing of the others is seen");
          check(*driver, driver->memset_async(region->address(), 0, kSlot, stream.id()),
                "memset_async");
          if (random.one_in(2)) {
            region->record(stream.id());
          } else {
            check(*driver, driver->stream_synchronize(stream.id()), "stream_synchronize");
            *first = i + 1;
          }
          require_ledger(*arena);
        }
      } catch (std::exception const& error) {
        std::printf("%s\n", error.what());
        ++num_failed;
      }
    });
  }
  std::thread reader([&] {
    while (!over) {
      require_ledger(*arena);
      static_cast<void>(set->owner());
      std::this_thread::yield();
    }
  });
  for (auto& thread : threads) thread.join();
  over = true;
  reader.join();
  require(num_failed == 0, "threads do not disturb each other");
  set->close(false);
  set.reset();
  arena->close();
  arena.reset();
  require_nothing_alive(*driver);
}

}  // namespace

void alias_set_threads(std::size_t num_gives) {
  run(num_gives / 2, false);
  run(num_gives / 2, true);
}

}  // namespace aegaeon::tests
