#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/bindings.hpp"
#include "error.hpp"
#include "transfer/prefetcher.hpp"

namespace aegaeon {
namespace {

// Waits without the GIL, and comes back to it now and then for Ctrl-C: the wake-up itself is
// direct.
template <typename Wait>
bool wait_interruptibly(std::optional<double> timeout_s, Wait wait_until) {
  constexpr auto kSignalInterval = std::chrono::milliseconds(100);
  std::optional<Clock::time_point> deadline;
  if (timeout_s) {
    auto longest = std::chrono::duration<double>(std::clamp(*timeout_s, 0.0, 1e9));
    deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(longest);
  }
  for (;;) {
    auto slice = Clock::now() + kSignalInterval;
    bool last = deadline && *deadline <= slice;
    {
      py::gil_scoped_release unlocked;
      if (wait_until(last ? *deadline : slice)) return true;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (last) return false;
  }
}

std::optional<Clock::duration> to_duration(std::optional<double> time_s) {
  if (!time_s) return std::nullopt;
  // Within what the clock can add; a deadline that has passed is the most urgent of all.
  std::chrono::duration<double> clamped(std::clamp(*time_s, -1e9, 1e9));
  return std::chrono::duration_cast<Clock::duration>(clamped);
}

std::shared_ptr<Ticket> submit(
    Prefetcher& self, Direction direction, std::shared_ptr<HostImage> image,
    std::shared_ptr<Region> region, std::int64_t priority, std::optional<double> deadline_s,
    std::optional<std::vector<std::tuple<std::size_t, std::size_t, std::size_t>>> order,
    std::optional<std::vector<std::size_t>> layer_ends, std::optional<StreamId> after) {
  TransferOptions options{.priority = priority,
                          .deadline = to_duration(deadline_s),
                          .layer_ends = std::move(layer_ends),
                          .after = after};
  if (order) {
    options.order.emplace();
    options.order->reserve(order->size());
    for (auto [in_region, in_image, size] : *order) {
      options.order->push_back({in_region, in_image, size});
    }
  }
  return self.submit(direction, std::move(image), std::move(region), std::move(options));
}

std::vector<std::pair<std::size_t, std::size_t>> ranges_done(Ticket const& self) {
  std::vector<std::pair<std::size_t, std::size_t>> done;
  for (auto const& range : self.order().ranges_within(self.bytes_done())) {
    done.emplace_back(range.offset_bytes, range.size_bytes);
  }
  return done;
}

void bind_ticket(py::module_& module) {
  py::native_enum<TicketState>(module, "TicketState", "enum.Enum")
      .value("QUEUED", TicketState::kQueued)
      .value("RUNNING", TicketState::kRunning)
      .value("DRAINING", TicketState::kDraining)
      .value("DONE", TicketState::kDone)
      .value("CANCELLED", TicketState::kCancelled)
      .value("FAILED", TicketState::kFailed)
      .finalize();

  py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket")
      .def_property_readonly("total_bytes", &Ticket::total_bytes)
      .def_property_readonly("bytes_done", &Ticket::bytes_done)
      .def_property_readonly("state", &Ticket::state)
      .def_property_readonly("finished", &Ticket::finished)
      .def_property_readonly("priority", py::cpp_function(&Ticket::priority, ReleaseGil()))
      .def_property_readonly("num_layers",
                             [](Ticket const& self) { return self.order().num_layers(); })
      .def("ranges_done", &ranges_done, ReleaseGil())
      .def(
          "bytes_through_layer",
          [](Ticket const& self, std::size_t layer_idx) {
            return self.order().bytes_through_layer(layer_idx);
          },
          py::arg("layer_idx"))
      .def(
          "bytes_through",
          [](Ticket const& self, std::size_t offset_bytes, std::size_t size_bytes) {
            return self.order().bytes_through({offset_bytes, size_bytes});
          },
          py::kw_only(), py::arg("offset_bytes"), py::arg("size_bytes"))
      .def("cancel", &Ticket::cancel, ReleaseGil())
      .def("set_priority", &Ticket::set_priority, py::arg("priority"), ReleaseGil())
      .def(
          "set_deadline",
          [](Ticket& self, std::optional<double> deadline_s) {
            return self.set_deadline(to_duration(deadline_s));
          },
          py::arg("deadline_s"), ReleaseGil())
      .def(
          "wait",
          [](Ticket& self, std::optional<double> timeout_s) {
            return wait_interruptibly(timeout_s,
                                      [&](auto deadline) { return self.wait_until(deadline); });
          },
          py::kw_only(), py::arg("timeout_s"))
      .def(
          "wait_bytes",
          [](Ticket& self, std::size_t num_bytes, std::optional<double> timeout_s) {
            return wait_interruptibly(timeout_s, [&](auto deadline) {
              return self.wait_bytes_until(num_bytes, deadline);
            });
          },
          py::arg("num_bytes"), py::kw_only(), py::arg("timeout_s"))
      .def(
          "wait_submitted",
          [](Ticket& self, std::size_t num_bytes, std::optional<double> timeout_s) {
            return wait_interruptibly(timeout_s, [&](auto deadline) {
              return self.wait_submitted_until(num_bytes, deadline);
            });
          },
          py::arg("num_bytes"), py::kw_only(), py::arg("timeout_s"))
      .def("wait_on_stream", &Ticket::wait_on_stream, py::kw_only(), py::arg("stream"),
           py::arg("num_bytes"), ReleaseGil())
      .def("check", &Ticket::check, ReleaseGil());
}

void bind_stats(py::module_& module) {
  py::class_<DurationHistogram>(module, "DurationHistogram")
      .def_property_readonly("num", &DurationHistogram::num)
      .def_property_readonly("total_s", &DurationHistogram::total_s)
      .def_property_readonly("max_s", &DurationHistogram::max_s)
      .def("quantile_s", &DurationHistogram::quantile_s, py::arg("share"));

  py::class_<DirectionStats>(module, "DirectionStats")
      .def_readonly("bytes", &DirectionStats::bytes)
      .def_readonly("num_chunks", &DirectionStats::num_chunks)
      .def_readonly("num_copies", &DirectionStats::num_copies)
      .def_readonly("busy_s", &DirectionStats::busy_s)
      .def_readonly("throttled_s", &DirectionStats::throttled_s)
      .def_property_readonly("num_done",
                             [](DirectionStats const& self) { return self.outcomes.num_done; })
      .def_property_readonly("num_late",
                             [](DirectionStats const& self) { return self.outcomes.num_late; })
      .def_property_readonly("num_cancelled",
                             [](DirectionStats const& self) { return self.outcomes.num_cancelled; })
      .def_property_readonly("num_failed",
                             [](DirectionStats const& self) { return self.outcomes.num_failed; })
      .def_readonly("queue_waits", &DirectionStats::queue_waits)
      .def_readonly("cancel_latencies", &DirectionStats::cancel_latencies);
}

void bind_prefetcher(py::module_& module) {
  py::native_enum<Direction>(module, "Direction", "enum.Enum")
      .value("LOAD", Direction::kLoad)
      .value("STORE", Direction::kStore)
      .finalize();

  py::class_<Prefetcher, std::shared_ptr<Prefetcher>>(module, "Prefetcher")
      .def(py::init([](std::shared_ptr<Driver> driver, std::size_t chunk_bytes, std::size_t depth,
                       std::optional<double> max_bytes_per_s,
                       std::optional<std::int64_t> cap_exempt_priority) {
             PrefetcherOptions options{.chunk_bytes = chunk_bytes,
                                       .depth = depth,
                                       .max_bytes_per_s = max_bytes_per_s,
                                       .cap_exempt_priority = cap_exempt_priority};
             return std::make_shared<Prefetcher>(std::move(driver), options);
           }),
           py::arg("driver"), py::kw_only(), py::arg("chunk_bytes"), py::arg("depth"),
           py::arg("max_bytes_per_s"), py::arg("cap_exempt_priority"), ReleaseGil())
      .def("submit", &submit, py::kw_only(), py::arg("direction"), py::arg("image"),
           py::arg("region"), py::arg("priority"), py::arg("deadline_s"), py::arg("order"),
           py::arg("layer_ends"), py::arg("after"), ReleaseGil())
      .def("set_rate", &Prefetcher::set_rate, py::arg("direction"), py::kw_only(),
           py::arg("max_bytes_per_s"), ReleaseGil())
      .def("set_chunk_bytes", &Prefetcher::set_chunk_bytes, py::arg("chunk_bytes"), ReleaseGil())
      .def("stats", &Prefetcher::stats, py::arg("direction"), ReleaseGil())
      .def("close", &Prefetcher::close, ReleaseGil());
}

}  // namespace

void bind_transfer(py::module_& module) {
  bind_ticket(module);
  bind_stats(module);
  bind_prefetcher(module);
}

}  // namespace aegaeon
