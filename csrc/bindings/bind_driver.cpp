// Drivers, and their raw calls: each returns the result code, or (code, value).
#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "driver/faulty.hpp"
#include "driver/simulated.hpp"
#include "error.hpp"

namespace aegaeon {
namespace {

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

std::chrono::nanoseconds to_ns(double time_s) {
  return std::chrono::round<std::chrono::nanoseconds>(std::chrono::duration<double>(time_s));
}

double to_s(Clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

void bind_simulated(py::module_& module) {
  py::class_<SimulatedDriver, Driver, std::shared_ptr<SimulatedDriver>>(module, "SimulatedDriver")
      .def(py::init([](std::shared_ptr<Driver> memory, double bytes_per_s, double copy_overhead_s,
                       double wake_latency_s) {
             return std::make_shared<SimulatedDriver>(
                 std::move(memory), SimulatedLink{.bytes_per_s = bytes_per_s,
                                                  .copy_overhead = to_ns(copy_overhead_s),
                                                  .wake_latency = to_ns(wake_latency_s)});
           }),
           py::arg("memory"), py::kw_only(), py::arg("bytes_per_s"), py::arg("copy_overhead_s"),
           py::arg("wake_latency_s"))
      .def_property_readonly("now_s", [](SimulatedDriver& self) { return to_s(self.now()); })
      .def(
          "advance", [](SimulatedDriver& self, double time_s) { self.advance(to_ns(time_s)); },
          py::arg("time_s"), ReleaseGil())
      .def(
          "hold_clock",
          [](SimulatedDriver& self, double limit_s) {
            self.hold_clock(Clock::time_point(to_ns(limit_s)));
          },
          py::arg("limit_s"), ReleaseGil())
      .def("release_clock", &SimulatedDriver::release_clock, ReleaseGil())
      .def("await_held", &SimulatedDriver::await_held, ReleaseGil())
      .def(
          "compute",
          [](SimulatedDriver& self, StreamId stream, double duration_s) {
            return self.compute(stream, to_ns(duration_s));
          },
          py::arg("stream"), py::kw_only(), py::arg("duration_s"), ReleaseGil())
      .def_property_readonly("copies", [](SimulatedDriver const& self) {
        std::vector<std::tuple<std::string, Address, std::size_t, double, double, double>> copies;
        for (auto const& copy : self.copies()) {
          copies.emplace_back(copy.call, copy.device_address, copy.bytes, to_s(copy.submitted),
                              to_s(copy.begin), to_s(copy.end));
        }
        return copies;
      });
}

template <typename Class>
void bind_raw_calls(Class& driver) {
  driver
      .def(
          "mem_create",
          [](Driver& self, std::size_t bytes, bool exportable) {
            MemHandle handle = 0;
            auto result = self.mem_create(&handle, bytes, exportable);
            return std::pair{result, handle};
          },
          py::arg("bytes"), py::kw_only(), py::arg("exportable") = false, ReleaseGil())
      .def("mem_release", &Driver::mem_release, py::arg("handle"), ReleaseGil())
      .def(
          "address_reserve",
          [](Driver& self, std::size_t bytes, std::size_t alignment) {
            Address address = 0;
            auto result = self.address_reserve(&address, bytes, alignment);
            return std::pair{result, address};
          },
          py::arg("bytes"), py::arg("alignment"), ReleaseGil())
      .def("address_free", &Driver::address_free, py::arg("address"), py::arg("bytes"),
           ReleaseGil())
      .def("mem_map", &Driver::mem_map, py::arg("address"), py::arg("bytes"), py::arg("offset"),
           py::arg("handle"), ReleaseGil())
      .def("mem_set_access", &Driver::mem_set_access, py::arg("address"), py::arg("bytes"),
           py::arg("access"), ReleaseGil())
      .def("mem_unmap", &Driver::mem_unmap, py::arg("address"), py::arg("bytes"), ReleaseGil())
      .def(
          "mem_export",
          [](Driver& self, MemHandle handle) {
            int fd = -1;
            auto result = self.mem_export(&fd, handle);
            return std::pair{result, fd};
          },
          py::arg("handle"), ReleaseGil())
      .def(
          "mem_import",
          [](Driver& self, int fd, std::size_t bytes) {
            MemHandle handle = 0;
            auto result = self.mem_import(&handle, fd, bytes);
            return std::pair{result, handle};
          },
          py::arg("fd"), py::arg("bytes"), ReleaseGil())
      .def(
          "host_alloc",
          [](Driver& self, std::size_t bytes) {
            void* memory = nullptr;
            auto result = self.host_alloc(&memory, bytes);
            return std::pair{result, reinterpret_cast<Address>(memory)};
          },
          py::arg("bytes"), ReleaseGil())
      .def(
          "host_free", [](Driver& self, Address memory) { return self.host_free(pointer(memory)); },
          py::arg("memory"), ReleaseGil())
      .def(
          "host_alloc_numa",
          [](Driver& self, std::size_t bytes) {
            void* memory = nullptr;
            auto result = self.host_alloc_numa(&memory, bytes);
            return std::pair{result, reinterpret_cast<Address>(memory)};
          },
          py::arg("bytes"), ReleaseGil())
      .def(
          "host_register",
          [](Driver& self, Address memory, std::size_t bytes) {
            return self.host_register(pointer(memory), bytes);
          },
          py::arg("memory"), py::arg("bytes"), ReleaseGil())
      .def(
          "host_unregister",
          [](Driver& self, Address memory) { return self.host_unregister(pointer(memory)); },
          py::arg("memory"), ReleaseGil())
      .def(
          "stream_create",
          [](Driver& self) {
            StreamId stream = 0;
            auto result = self.stream_create(&stream);
            return std::pair{result, stream};
          },
          ReleaseGil())
      .def("stream_destroy", &Driver::stream_destroy, py::arg("stream"), ReleaseGil())
      .def("stream_synchronize", &Driver::stream_synchronize, py::arg("stream"), ReleaseGil())
      .def("stream_wait_event", &Driver::stream_wait_event, py::arg("stream"), py::arg("event"),
           ReleaseGil())
      .def(
          "stream_is_capturing",
          [](Driver& self, StreamId stream) {
            bool capturing = false;
            auto result = self.stream_is_capturing(&capturing, stream);
            return std::pair{result, capturing};
          },
          py::arg("stream"), ReleaseGil())
      .def(
          "memcpy_h2d_async",
          [](Driver& self, Address destination, Address source, std::size_t bytes,
             StreamId stream) {
            return self.memcpy_h2d_async(destination, pointer(source), bytes, stream);
          },
          py::arg("destination"), py::arg("source"), py::arg("bytes"), py::arg("stream"),
          ReleaseGil())
      .def(
          "memcpy_d2h_async",
          [](Driver& self, Address destination, Address source, std::size_t bytes,
             StreamId stream) {
            return self.memcpy_d2h_async(pointer(destination), source, bytes, stream);
          },
          py::arg("destination"), py::arg("source"), py::arg("bytes"), py::arg("stream"),
          ReleaseGil())
      .def("memcpy_d2d_async", &Driver::memcpy_d2d_async, py::arg("destination"), py::arg("source"),
           py::arg("bytes"), py::arg("stream"), ReleaseGil())
      .def("memset_async", &Driver::memset_async, py::arg("destination"), py::arg("value"),
           py::arg("bytes"), py::arg("stream"), ReleaseGil())
      .def(
          "event_create",
          [](Driver& self) {
            EventId event = 0;
            auto result = self.event_create(&event);
            return std::pair{result, event};
          },
          ReleaseGil())
      .def("event_destroy", &Driver::event_destroy, py::arg("event"), ReleaseGil())
      .def("event_record", &Driver::event_record, py::arg("event"), py::arg("stream"), ReleaseGil())
      .def("event_query", &Driver::event_query, py::arg("event"), ReleaseGil())
      .def("event_synchronize", &Driver::event_synchronize, py::arg("event"), ReleaseGil());
}

}  // namespace

void bind_driver(py::module_& module) {
  py::native_enum<Access>(module, "Access", "enum.Enum")
      .value("NONE", Access::kNone)
      .value("READ", Access::kRead)
      .value("READWRITE", Access::kReadWrite)
      .finalize();

  py::class_<Driver, std::shared_ptr<Driver>> driver(module, "Driver");
  driver.def_property_readonly("name", &Driver::name)
      .def_property_readonly(
          "kind",
          [](Driver const& self) { return self.kind() == DeviceKind::kCuda ? "cuda" : "host"; })
      .def_property_readonly("device_index", &Driver::device_index)
      .def_property_readonly("granularity_bytes", &Driver::granularity_bytes)
      .def_property_readonly("dlpack_device", &dlpack_device)
      .def("describe", &Driver::describe, py::arg("code"))
      .def(
          "memory_info",
          [](Driver& self) {
            MemoryInfo info;
            check(self, self.memory_info(&info), "memory_info");
            return std::pair{info.free_bytes, info.total_bytes};
          },
          ReleaseGil());
  bind_raw_calls(driver);

  py::class_<FaultyDriver, Driver, std::shared_ptr<FaultyDriver>>(module, "FaultyDriver")
      .def(py::init<std::shared_ptr<Driver>>(), py::arg("inner"))
      .def("fail_call", &FaultyDriver::fail_call, py::kw_only(), py::arg("n"), py::arg("call"),
           py::arg("code"), py::arg("persistent"), ReleaseGil())
      .def("hold", &FaultyDriver::hold, py::arg("call"), ReleaseGil())
      .def("release", &FaultyDriver::release, ReleaseGil())
      .def("set_capturing", &FaultyDriver::set_capturing, py::arg("capturing"), ReleaseGil())
      .def_property_readonly("copies",
                             [](FaultyDriver const& self) {
                               std::vector<std::tuple<std::string, Address, std::size_t>> copies;
                               for (auto const& copy : self.copies()) {
                                 copies.emplace_back(copy.call, copy.device_address, copy.bytes);
                               }
                               return copies;
                             })
      .def("reset", &FaultyDriver::reset, ReleaseGil())
      .def_property_readonly("calls", &FaultyDriver::calls)
      .def_property_readonly("live", &FaultyDriver::live);

  bind_simulated(module);

  module.def("make_host_driver", py::overload_cast<std::size_t, bool>(&make_host_driver),
             py::kw_only(), py::arg("capacity_bytes"), py::arg("move_page_tables"));
  module.def("make_cuda_driver", &make_cuda_driver, py::kw_only(), py::arg("index"),
             py::arg("library"), ReleaseGil());
  module.def("count_cuda_devices", &count_cuda_devices, py::kw_only(), py::arg("library"),
             ReleaseGil());
}

}  // namespace aegaeon
