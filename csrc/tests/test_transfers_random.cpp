// Random transfers from several threads, checked byte for byte; and transfers with faults.
#include <atomic>
#include <thread>

#include "tests/support.hpp"
#include "transfer/prefetcher.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kSize = 8 * kGranule;

void fill(std::byte* data, std::uint32_t seed) {
  std::uint32_t state = seed * 2654435761u + 1;
  for (std::size_t i = 0; i < kSize; i += 4) {
    state = state * 1664525u + 1013904223u;
    std::memcpy(data + i, &state, 4);
  }
}

// Pieces whose gaps differ on the two sides.
std::vector<Piece> random_order(Random& random) {
  std::vector<Piece> order;
  std::size_t offset = random.below(10000);
  std::size_t image_offset = random.one_in(2) ? offset : random.below(10000);
  while (order.size() < 50) {
    auto size = 1 + (random.one_in(4) ? random.below(3 * kGranule) : random.below(20000));
    if (std::max(offset, image_offset) + size > kSize) break;
    order.push_back({offset, image_offset, size});
    offset += size + (random.one_in(2) ? random.below(10000) : 0);
    image_offset += size + (random.one_in(2) ? random.below(10000) : 0);
  }
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  return order;
}

std::optional<Clock::time_point> soon() {
  return Clock::now() + std::chrono::seconds(60);
}

}  // namespace

void transfers_random() {
  auto driver = std::make_shared<FaultyDriver>(make_host_driver(8 * kSize, true));
  auto arena = std::make_shared<Arena>(driver, 8 * kSize, 4 * kGranule);
  std::atomic<int> num_failed = 0;
  {
    Prefetcher prefetcher(driver, {.chunk_bytes = kGranule, .depth = 2});
    std::vector<std::thread> threads;
    for (std::uint32_t seed = 0; seed < 4; ++seed) {
      threads.emplace_back([&, seed] {
        try {
          Random random(seed);
          auto region = arena->reserve(kSize, concat("owner", seed), "t");
          auto image = std::make_shared<HostImage>(driver, kSize, "in");
          auto back = std::make_shared<HostImage>(driver, kSize, "out");
          fill(image->data(), seed);
          for (int round = 0; round < 12; ++round) {
            region->map(0, std::nullopt);
            auto* device = pointer(region->address());
            std::memset(device, 0, kSize);
            auto order = random_order(random);
            auto load = prefetcher.submit(
                Direction::kLoad, image, region,
                {.priority = static_cast<std::int64_t>(random.below(3)), .order = order});
            if (random.one_in(4)) {
              load->cancel();
              require(load->wait_until(soon()), "a cancelled transfer ends");
            } else {
              require(load->wait_bytes_until(load->total_bytes() / 2, soon()), "bytes arrive");
              auto left = load->bytes_done();
              for (auto const& piece : order) {
                if (piece.size_bytes > left) break;
                require(
                    std::memcmp(device + piece.region_offset_bytes,
                                image->data() + piece.image_offset_bytes, piece.size_bytes) == 0,
                    "bytes_done is a prefix of the order");
                left -= piece.size_bytes;
              }
              require(load->wait_until(soon()), "a transfer ends");
              load->check();
              auto stored = random_order(random);
              auto store = prefetcher.submit(Direction::kStore, back, region, {.order = stored});
              require(store->wait_until(soon()), "a store ends");
              store->check();
              for (auto const& piece : stored) {
                require(std::memcmp(back->data() + piece.image_offset_bytes,
                                    device + piece.region_offset_bytes, piece.size_bytes) == 0,
                        "a store brings the bytes back");
              }
            }
            region->unmap(0, std::nullopt);
          }
        } catch (std::exception const& error) {
          std::printf("%s\n", error.what());
          ++num_failed;
        }
      });
    }
    for (auto& thread : threads) thread.join();
  }
  require(num_failed == 0, "transfers are right");
  arena->close();
  arena.reset();
  require_nothing_alive(*driver);
}

void faults() {
  for (std::uint32_t seed = 0; seed < 120; ++seed) {
    Random random(seed);
    auto driver = std::make_shared<FaultyDriver>(make_host_driver(4 * kSize, true));
    auto arena = std::make_shared<Arena>(driver, 4 * kSize, 4 * kGranule);
    // One of each per direction: the two are not ordered with each other.
    std::vector<std::shared_ptr<Region>> regions;
    std::vector<std::shared_ptr<HostImage>> images;
    for (auto const* name : {"load", "store"}) {
      regions.push_back(arena->reserve(kSize, name, "t"));
      regions.back()->map(0, std::nullopt);
      images.push_back(std::make_shared<HostImage>(driver, kSize, name));
    }
    Prefetcher prefetcher(driver, {.chunk_bytes = kGranule, .depth = 1 + random.below(3)});
    driver->fail_call(1 + random.below(25), std::nullopt, 719, random.one_in(2));
    std::vector<std::shared_ptr<Ticket>> tickets;
    for (int i = 0; i < 4; ++i) {
      auto which = random.below(2);
      auto direction = which == 0 ? Direction::kLoad : Direction::kStore;
      tickets.push_back(prefetcher.submit(direction, images[which], regions[which],
                                          {.order = random_order(random)}));
      if (random.one_in(5)) tickets.back()->cancel();
    }
    for (auto const& ticket : tickets) {
      require(ticket->wait_until(soon()), "a transfer ends, whatever the driver does");
      require((ticket->state() == TicketState::kDone) ==
                  (ticket->bytes_done() == ticket->total_bytes() &&
                   ticket->state() != TicketState::kCancelled &&
                   ticket->state() != TicketState::kFailed),
              "only complete transfers are done");
    }
    driver->reset();
    for (auto const& region : regions) {
      for (int attempt = 0;; ++attempt) {  // the device answers again: memory comes free by itself
        try {
          region->unmap(0, std::nullopt);
          break;
        } catch (LifecycleError const&) {
          require(attempt < 1000, "holds of failed transfers end");
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
      }
    }
    prefetcher.close();
    arena->close();
    images.clear();
    tickets.clear();
    regions.clear();
    arena.reset();
    require_nothing_alive(*driver);
  }
}

}  // namespace aegaeon::tests
