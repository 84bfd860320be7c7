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

std::shared_ptr<Ticket> submit(
    Prefetcher& self, Direction direction, std::shared_ptr<HostImage> image,
    std::shared_ptr<Region> region, std::int64_t priority,
    std::optional<std::vector<std::tuple<std::size_t, std::size_t, std::size_t>>> order) {
  std::optional<std::vector<Piece>> pieces;
  if (order) {
    pieces.emplace();
    pieces->reserve(order->size());
    for (auto [in_region, in_image, size] : *order) {
      pieces->push_back({in_region, in_image, size});
    }
  }
  return self.submit(direction, std::move(image), std::move(region), priority, std::move(pieces));
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
      .def("cancel", &Ticket::cancel, ReleaseGil())
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
      .def("check", &Ticket::check, ReleaseGil());
}

void bind_prefetcher(py::module_& module) {
  py::native_enum<Direction>(module, "Direction", "enum.Enum")
      .value("LOAD", Direction::kLoad)
      .value("STORE", Direction::kStore)
      .finalize();

  py::class_<QueueWait>(module, "QueueWait")
      .def_readonly("num_transfers", &QueueWait::num_transfers)
      .def_readonly("total_s", &QueueWait::total_s)
      .def_readonly("max_s", &QueueWait::max_s);

  py::class_<DirectionStats>(module, "DirectionStats")
      .def_readonly("bytes", &DirectionStats::bytes)
      .def_readonly("num_chunks", &DirectionStats::num_chunks)
      .def_readonly("num_copies", &DirectionStats::num_copies)
      .def_readonly("busy_s", &DirectionStats::busy_s)
      .def_readonly("queue_waits", &DirectionStats::queue_waits);

  py::class_<Prefetcher, std::shared_ptr<Prefetcher>>(module, "Prefetcher")
      .def(py::init<std::shared_ptr<Driver>, std::size_t, std::size_t>(), py::arg("driver"),
           py::kw_only(), py::arg("chunk_bytes"), py::arg("depth"), ReleaseGil())
      .def("submit", &submit, py::kw_only(), py::arg("direction"), py::arg("image"),
           py::arg("region"), py::arg("priority"), py::arg("order"), ReleaseGil())
      .def("stats", &Prefetcher::stats, py::arg("direction"), ReleaseGil())
      .def("close", &Prefetcher::close, ReleaseGil());
}

}  // namespace

void bind_transfer(py::module_& module) {
  bind_ticket(module);
  bind_prefetcher(module);
}

}  // namespace aegaeon
