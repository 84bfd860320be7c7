#include <pybind11/stl.h>

#include "bindings/bindings.hpp"

namespace aegaeon {
namespace {

py::capsule region_dlpack(Region& self, std::size_t offset_bytes, std::vector<std::int64_t> shape,
                          std::uint8_t type_code, std::uint8_t type_bits, bool versioned) {
  std::shared_ptr<Region::Export> keep;
  {
    py::gil_scoped_release unlocked;  // the arena's mutex may be held for a long map
    keep = self.export_range({offset_bytes, dlpack_bytes(shape, type_bits)});
  }
  return make_dlpack(self.arena()->driver().get(), self.address() + offset_bytes, std::move(shape),
                     {type_code, type_bits}, versioned, false, std::move(keep));
}

}  // namespace

void bind_vmm(py::module_& module) {
  py::class_<ArenaStats>(module, "ArenaStats")
      .def_readonly("owners", &ArenaStats::owners)
      .def_readonly("capacity_bytes", &ArenaStats::capacity_bytes)
      .def_readonly("free_bytes", &ArenaStats::free_bytes)
      .def_readonly("quarantined_bytes", &ArenaStats::quarantined_bytes)
      .def_readonly("handle_bytes", &ArenaStats::handle_bytes)
      .def_readonly("num_regions", &ArenaStats::num_regions)
      .def_property_readonly("created_bytes",
                             [](ArenaStats const& self) { return self.pool.created_bytes; })
      .def_property_readonly("num_handles",
                             [](ArenaStats const& self) { return self.pool.num_handles; })
      .def_property_readonly("num_tail_handles",
                             [](ArenaStats const& self) { return self.pool.num_tail_handles; })
      .def_property_readonly("num_free_handles",
                             [](ArenaStats const& self) { return self.pool.num_free_handles; })
      .def_property_readonly("num_free_tail_handles",
                             [](ArenaStats const& self) { return self.pool.num_free_tail_handles; })
      .def_property_readonly("total_created",
                             [](ArenaStats const& self) { return self.pool.total_created; })
      .def_property_readonly("total_released",
                             [](ArenaStats const& self) { return self.pool.total_released; })
      .def_property_readonly("total_converted",
                             [](ArenaStats const& self) { return self.pool.total_converted; });

  py::class_<Arena, std::shared_ptr<Arena>> arena(module, "Arena");
  py::class_<Region, std::shared_ptr<Region>> region(module, "Region");
  arena
      .def(py::init<std::shared_ptr<Driver>, std::size_t, std::optional<std::size_t>>(),
           py::arg("driver"), py::kw_only(), py::arg("capacity_bytes"), py::arg("handle_bytes"))
      .def("reserve", &Arena::reserve, py::kw_only(), py::arg("size_bytes"), py::arg("owner"),
           py::arg("tag"), ReleaseGil())
      .def("set_limit", &Arena::set_limit, py::kw_only(), py::arg("owner"), py::arg("min_bytes"),
           py::arg("max_bytes"), ReleaseGil())
      .def("stats", &Arena::stats, ReleaseGil())
      .def("close", &Arena::close, ReleaseGil())
      .def_property_readonly("driver", &Arena::driver)
      .def_property_readonly("capacity_bytes", &Arena::capacity_bytes)
      .def_property_readonly("handle_bytes", &Arena::handle_bytes);

  region
      .def("map", &Region::map, py::kw_only(), py::arg("offset_bytes"), py::arg("size_bytes"),
           ReleaseGil())
      .def("unmap", &Region::unmap, py::kw_only(), py::arg("offset_bytes"), py::arg("size_bytes"),
           ReleaseGil())
      .def("close", &Region::close, ReleaseGil())
      .def_property_readonly("address", &Region::address)
      .def_property_readonly("size_bytes", &Region::size_bytes)
      .def_property_readonly("mapped_bytes", &Region::mapped_bytes)
      .def(
          "mapped_ranges",
          [](Region const& self) {
            std::vector<std::pair<std::size_t, std::size_t>> ranges;
            for (auto const& range : self.mapped_ranges()) {
              ranges.emplace_back(range.offset_bytes, range.size_bytes);
            }
            return ranges;
          },
          ReleaseGil())
      .def_property_readonly("generation", &Region::generation)
      .def_property_readonly("closed", &Region::closed)
      .def_property_readonly("owner", &Region::owner)
      .def_property_readonly("tag", &Region::tag)
      .def("dlpack", &region_dlpack, py::kw_only(), py::arg("offset_bytes"), py::arg("shape"),
           py::arg("type_code"), py::arg("type_bits"), py::arg("versioned"));
}

}  // namespace aegaeon
