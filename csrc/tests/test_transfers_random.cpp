// Random transfers from several threads, with odd sizes and orders, cancels, faults, other work of
// the device before and after them: every byte is checked against an oracle, and every transfer
// ends once. On the host driver, where copies race, and on the simulated one, where they happen at
// the last moment.
#include <atomic>
#include <memory>
#include <optional>
#include <thread>

#include "driver/simulated.hpp"
#include "tests/support.hpp"
#include "transfer/prefetcher.hpp"

namespace aegaeon::tests {
namespace {

constexpr std::size_t kNumThreads = 4;
constexpr std::size_t kArea = 64 << 10;  // of image and region, that a thread works on

using Bytes = std::vector<std::byte>;

void fill(std::byte* data, std::size_t bytes, std::uint64_t seed) {
  std::uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (std::size_t i = 0; i + 8 <= bytes; i += 8) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::memcpy(data + i, &state, 8);
  }
}

std::optional<Clock::time_point> soon() {
  return Clock::now() + std::chrono::seconds(120);
}

struct Order {
  std::vector<Piece> pieces;
  std::optional<std::vector<std::size_t>> layer_ends;
};

// Pieces of odd sizes, most of them small, with different gaps on the two sides, shuffled.
Order random_order(Random& random) {
  Order order;
  std::size_t in_region = random.below(500);
  std::size_t in_image = random.one_in(2) ? in_region : random.below(500);
  auto num_pieces = 1 + random.below(random.one_in(8) ? 60 : 6);
  while (order.pieces.size() < num_pieces) {
    auto size = 1 + (random.one_in(3) ? random.below(30'000) : random.below(1'000));
    if (std::max(in_region, in_image) + size > kArea) break;
    order.pieces.push_back({in_region, in_image, size});
    in_region += size + (random.one_in(2) ? random.below(500) : 0);
    in_image += size + (random.one_in(2) ? random.below(500) : 0);
  }
  if (order.pieces.empty()) order.pieces.push_back({0, 0, 1});
  for (std::size_t i = order.pieces.size(); i > 1; --i) {
    std::swap(order.pieces[i - 1], order.pieces[random.below(i)]);
  }
  if (random.one_in(2)) {
    order.layer_ends.emplace();
    for (std::size_t end = 1; end < order.pieces.size(); ++end) {
      if (random.one_in(3)) order.layer_ends->push_back(end);
    }
    order.layer_ends->push_back(order.pieces.size());
  }
  return order;
}

// Sets up a failure of one call of the prefetcher, whosever transfer it hits.
void plan_fault(FaultyDriver& driver, Random& random) {
  static constexpr std::array kCalls{"memcpy_h2d_async",  "memcpy_d2h_async",   "event_record",
                                     "event_synchronize", "event_query",        "event_create",
                                     "stream_wait_event", "stream_is_capturing"};
  static constexpr std::array<Result, 4> kCodes{1, 2, 700, 719};
  driver.reset();  // forgets its list of copies too
  driver.fail_call(1 + random.below(8), kCalls[random.below(kCalls.size())],
                   kCodes[random.below(kCodes.size())], false);
}

struct Outcomes {
  std::size_t num_done = 0;
  std::size_t num_cancelled = 0;
  std::size_t num_failed = 0;
};

// One thread's area of a region and its images, and what it does with them.
class Worker {
 public:
  // inner: the driver without faults, for the worker's own stream.
  Worker(std::shared_ptr<FaultyDriver> driver, std::shared_ptr<Driver> inner,
         std::shared_ptr<Arena> const& arena, Prefetcher& prefetcher, std::uint32_t seed)
      : driver_(std::move(driver)),
        inner_(std::move(inner)),
        prefetcher_(prefetcher),
        random_(seed),
        region_(arena->reserve(kGranule, concat("owner", seed), "t")),
        image_(std::make_shared<HostImage>(driver_, kArea, concat("image", seed))),
        stream_(inner_) {
    region_->map(0, std::nullopt);
  }

  // Until one of them has found something wrong.
  void run(std::size_t num_transfers, std::atomic<int> const& num_wrong) {
    for (std::size_t i = 0; i < num_transfers && num_wrong == 0; ++i) {
      if (random_.one_in(100)) prefetcher_.set_chunk_bytes(1 + random_.below(40'000));
      if (random_.one_in(300)) {
        auto direction = random_.one_in(2) ? Direction::kLoad : Direction::kStore;
        prefetcher_.set_rate(direction, random_.one_in(2) ? std::nullopt : std::optional(2e9));
      }
      if (random_.one_in(60)) plan_fault(*driver_, random_);
      transfer(random_.one_in(2) ? Direction::kLoad : Direction::kStore);
      if (random_.one_in(50)) {
        region_->unmap(0, std::nullopt);  // who has seen the end may do this
        region_->map(0, std::nullopt, Contents::kPreserve);
      }
    }
  }

  [[nodiscard]] Outcomes const& outcomes() const noexcept { return outcomes_; }

 private:
  void transfer(Direction direction) {
    bool is_load = direction == Direction::kLoad;
    auto* device = pointer(region_->address());
    auto* source = is_load ? image_->data() : device;
    auto* target = is_load ? device : image_->data();
    auto order = random_order(random_);
    fill(source, kArea, ++fills_);
    fill(target, kArea, ++fills_);
    before_.assign(target, target + kArea);
    original_.assign(source, source + kArea);
    TransferOptions options{.priority = static_cast<std::int64_t>(random_.below(4)),
                            .order = order.pieces,
                            .layer_ends = order.layer_ends};
    if (random_.one_in(3)) options.deadline = std::chrono::microseconds(random_.below(2'000));
    if (random_.one_in(4)) {
      // The stream is not done yet when the transfer is submitted: what it writes comes first.
      auto value = static_cast<std::uint8_t>(fills_);
      check(*inner_, inner_->memset_async(region_->address(), value, kArea, stream_.id()),
            "memset_async");
      std::fill_n((is_load ? before_ : original_).begin(), kArea, std::byte{value});
      options.after = stream_.id();
    }
    std::shared_ptr<Ticket> ticket;
    try {
      ticket = prefetcher_.submit(direction, image_, region_, options);
    } catch (DriverError const&) {  // of the gate; then nothing has happened
      settle_stream();
      return;
    }
    expect(*ticket, order, is_load);
    interfere(*ticket, target);
    if (is_load && random_.one_in(4)) look_from_the_stream(*ticket);
    require(ticket->wait_until(soon()), "a transfer ends");
    settle_stream();  // what came before the transfer: too late now to change anything
    check_end(*ticket, target);
  }

  // Which bytes the whole of the order leaves behind, and where each is in it (0: not part of it).
  void expect(Ticket const& ticket, Order const& order, bool is_load) {
    after_ = before_;
    position_.assign(kArea, 0);
    std::size_t reached = 0;
    for (auto const& piece : order.pieces) {
      auto from = is_load ? piece.image_offset_bytes : piece.region_offset_bytes;
      auto to = is_load ? piece.region_offset_bytes : piece.image_offset_bytes;
      std::memcpy(after_.data() + to, original_.data() + from, piece.size_bytes);
      for (std::size_t i = 0; i < piece.size_bytes; ++i) position_[to + i] = ++reached;
    }
    require(ticket.total_bytes() == reached, "total_bytes is that of the order");
  }

  void interfere(Ticket& ticket, std::byte const* target) {
    if (random_.one_in(4)) ticket.set_priority(static_cast<std::int64_t>(random_.below(4)) - 1);
    if (random_.one_in(8)) ticket.set_deadline(std::chrono::microseconds(random_.below(500)));
    if (random_.one_in(5)) {
      auto bytes = random_.below(ticket.total_bytes() + 1);
      require(ticket.wait_bytes_until(bytes, soon()), "bytes arrive");
      require(ticket.bytes_done() >= bytes || ticket.finished(), "bytes have arrived, or an end");
      check_prefix(ticket.bytes_done(), target);
    }
    if (random_.one_in(5)) ticket.cancel();
    if (random_.one_in(8)) {
      auto layer = random_.below(ticket.order().num_layers());
      auto bytes = ticket.order().bytes_through_layer(layer);
      require(ticket.wait_bytes_until(bytes, soon()), "a layer arrives, or the transfer ends");
    }
    if (random_.one_in(8)) {
      auto ranges = ticket.order().ranges_within(ticket.bytes_done());
      for (auto const& range : ranges) {
        require(ticket.order().bytes_through(range) <= ticket.bytes_done(), "it has arrived");
        require(std::memcmp(target + range.offset_bytes, after_.data() + range.offset_bytes,
                            range.size_bytes) == 0,
                "ranges_done have arrived");
      }
    }
  }

  // A stream that waits for a part of the transfer sees all of this part.
  void look_from_the_stream(Ticket& ticket) {
    auto bytes = 1 + random_.below(ticket.total_bytes());
    require(ticket.wait_submitted_until(bytes, soon()), "copies are submitted");
    try {
      ticket.wait_on_stream(stream_.id(), bytes);
    } catch (DriverError const&) {  // of the transfer, or of the call
      return;
    } catch (TransferCancelled const&) {
      return;
    }
    for (auto const& range : ticket.order().ranges_within(bytes)) {
      check(*inner_,
            inner_->memcpy_d2h_async(seen_.data() + range.offset_bytes,
                                     region_->address() + range.offset_bytes, range.size_bytes,
                                     stream_.id()),
            "memcpy_d2h_async");
    }
    settle_stream();
    check_prefix(bytes, seen_.data());
  }

  void check_prefix(std::size_t bytes, std::byte const* target) const {
    std::size_t num_wrong = 0;
    for (std::size_t i = 0; i < kArea; ++i) {
      num_wrong += position_[i] != 0 && position_[i] <= bytes && target[i] != after_[i];
    }
    require(num_wrong == 0, "bytes_done is a prefix of the order");
  }

  void check_end(Ticket const& ticket, std::byte const* target) {
    auto state = ticket.state();
    auto done = ticket.bytes_done();
    bool threw = false;
    try {
      ticket.check();
    } catch (TransferCancelled const&) {
      require(state == TicketState::kCancelled, "only a cancelled transfer says so");
      threw = true;
    } catch (DriverError const&) {
      require(state == TicketState::kFailed, "only a failed transfer says so");
      threw = true;
    }
    require(threw == (state != TicketState::kDone), "who is not done says why");
    ++(state == TicketState::kDone     ? outcomes_.num_done
       : state == TicketState::kFailed ? outcomes_.num_failed
                                       : outcomes_.num_cancelled);
    if (state == TicketState::kDone) {
      require(done == ticket.total_bytes(), "what is done is complete");
      require(std::memcmp(target, after_.data(), kArea) == 0,
              "the transfer brought its bytes, and changed no other");
      return;
    }
    check_prefix(done, target);
    std::size_t num_wrong = 0;
    for (std::size_t i = 0; i < kArea; ++i) {
      num_wrong += target[i] != after_[i] && target[i] != before_[i];
    }
    require(num_wrong == 0, "no byte is a third thing");
  }

  void settle_stream() {
    check(*inner_, inner_->stream_synchronize(stream_.id()), "stream_synchronize");
  }

  std::shared_ptr<FaultyDriver> driver_;
  std::shared_ptr<Driver> inner_;
  Prefetcher& prefetcher_;
  Random random_;
  std::shared_ptr<Region> region_;
  std::shared_ptr<HostImage> image_;
  Stream stream_;
  std::uint64_t fills_ = 0;
  Bytes before_ = Bytes(kArea);    // the target before the transfer
  Bytes original_ = Bytes(kArea);  // the source
  Bytes after_ = Bytes(kArea);     // the target after all of it
  Bytes seen_ = Bytes(kArea);
  std::vector<std::size_t> position_;
  Outcomes outcomes_;
};

void random_transfers(std::shared_ptr<Driver> const& inner, std::size_t num_transfers) {
  auto driver = std::make_shared<FaultyDriver>(inner);
  auto arena = std::make_shared<Arena>(driver, 2 * kNumThreads * kGranule, kGranule);
  {
    Prefetcher prefetcher(driver, {.chunk_bytes = 10'000, .depth = 2, .cap_exempt_priority = 0});
    std::vector<std::unique_ptr<Worker>> workers;
    for (std::uint32_t i = 0; i < kNumThreads; ++i) {
      workers.push_back(std::make_unique<Worker>(driver, inner, arena, prefetcher, i));
    }
    std::vector<std::thread> threads;
    std::atomic<int> num_wrong = 0;
    for (auto& worker : workers) {
      threads.emplace_back([&] {
        try {
          worker->run(num_transfers / kNumThreads, num_wrong);
        } catch (std::exception const& error) {
          std::printf("%s\n", error.what());
          ++num_wrong;
        }
      });
    }
    for (auto& thread : threads) thread.join();
    require(num_wrong == 0, "transfers are right");
    driver->reset();
    Outcomes seen;
    for (auto const& worker : workers) {
      seen.num_done += worker->outcomes().num_done;
      seen.num_cancelled += worker->outcomes().num_cancelled;
      seen.num_failed += worker->outcomes().num_failed;
    }
    Outcomes counted;
    for (auto direction : {Direction::kLoad, Direction::kStore}) {
      auto outcomes = prefetcher.stats(direction).outcomes;
      counted.num_done += outcomes.num_done;
      counted.num_cancelled += outcomes.num_cancelled;
      counted.num_failed += outcomes.num_failed;
    }
    require(seen.num_done == counted.num_done && seen.num_cancelled == counted.num_cancelled &&
                seen.num_failed == counted.num_failed,
            "every transfer ends once");
    std::printf("        %zu done, %zu cancelled, %zu failed\n", seen.num_done, seen.num_cancelled,
                seen.num_failed);
    require(seen.num_failed * 500 > num_transfers, "faults happen");
    require(seen.num_cancelled * 50 > num_transfers, "cancels happen");
  }
  arena->close();
  arena.reset();
  require_nothing_alive(*driver);
}

constexpr std::size_t kLarge = 8 * kGranule;

std::vector<Piece> large_order(Random& random) {
  std::vector<Piece> order;
  for (std::size_t offset = random.below(10'000); order.size() < 50;) {
    auto size = 1 + (random.one_in(4) ? random.below(3 * kGranule) : random.below(20'000));
    if (offset + size > kLarge) break;
    order.push_back({offset, offset, size});
    offset += size + (random.one_in(2) ? random.below(10'000) : 0);
  }
  return order;
}

// Memory that copies may still touch is not given back while the device does not answer, and comes
// free by itself when it does.
void faults_on(std::shared_ptr<Driver> const& inner, std::uint32_t seed) {
  Random random(seed);
  auto driver = std::make_shared<FaultyDriver>(inner);
  auto arena = std::make_shared<Arena>(driver, 4 * kLarge, 4 * kGranule);
  // One of each per direction: the two are not ordered with each other.
  std::vector<std::shared_ptr<Region>> regions;
  std::vector<std::shared_ptr<HostImage>> images;
  for (auto const* name : {"load", "store"}) {
    regions.push_back(arena->reserve(kLarge, name, "t"));
    regions.back()->map(0, std::nullopt);
    images.push_back(std::make_shared<HostImage>(driver, kLarge, name));
  }
  Prefetcher prefetcher(driver, {.chunk_bytes = kGranule, .depth = 1 + random.below(3)});
  driver->fail_call(1 + random.below(25), std::nullopt, 719, random.one_in(2));
  std::vector<std::shared_ptr<Ticket>> tickets;
  for (int i = 0; i < 4; ++i) {
    auto which = random.below(2);
    auto direction = which == 0 ? Direction::kLoad : Direction::kStore;
    tickets.push_back(prefetcher.submit(direction, images[which], regions[which],
                                        {.order = large_order(random)}));
    if (random.one_in(5)) tickets.back()->cancel();
  }
  for (auto const& ticket : tickets) {
    require(ticket->wait_until(soon()), "a transfer ends, whatever the driver does");
    auto state = ticket->state();
    require((state == TicketState::kDone) ==
                (ticket->bytes_done() == ticket->total_bytes() &&
                 state != TicketState::kCancelled && state != TicketState::kFailed),
            "only complete transfers are done");
  }
  driver->reset();
  for (auto const& region : regions) {
    for (int attempt = 0;; ++attempt) {
      try {
        region->unmap(0, std::nullopt);
        break;
      } catch (LifecycleError const&) {
        require(attempt < 1'000, "holds of failed transfers end");
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
  if (auto* late = dynamic_cast<SimulatedDriver*>(inner.get())) {
    late->advance(std::chrono::hours(1));
    Stream stream(inner);
    require(inner->stream_synchronize(stream.id()) == kSuccess,
            "no copy is left that meets memory which is gone");
  }
}

std::shared_ptr<Driver> host() {
  return make_host_driver(8 * kLarge, true);
}

std::shared_ptr<Driver> simulated() {
  using std::chrono::microseconds;
  return std::make_shared<SimulatedDriver>(
      host(), SimulatedLink{.copy_overhead = microseconds(2), .wake_latency = microseconds(5)});
}

}  // namespace

void transfers_on_host(std::size_t num_transfers) {
  random_transfers(host(), num_transfers);
}

void transfers_on_simulated(std::size_t num_transfers) {
  random_transfers(simulated(), num_transfers);
}

void transfer_faults(std::size_t num_seeds) {
  for (std::uint32_t seed = 0; seed < num_seeds; ++seed) {
    faults_on(host(), seed);
    faults_on(simulated(), seed);
  }
}

}  // namespace aegaeon::tests
