#include <pybind11/functional.h>
#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "vmm/alias_set.hpp"
#include "vmm/copy.hpp"
#include "vmm/shared_region.hpp"

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

py::capsule shared_dlpack(SharedRegion& self, std::size_t offset_bytes,
                          std::vector<std::int64_t> shape, std::uint8_t type_code,
                          std::uint8_t type_bits, bool versioned) {
  auto keep = self.export_range({offset_bytes, dlpack_bytes(shape, type_bits)});
  return make_dlpack(self.driver().get(), self.address() + offset_bytes, std::move(shape),
                     {type_code, type_bits}, versioned, self.read_only(), std::move(keep));
}

void region_copy_in(Region& self, Stream const& stream, std::size_t offset_bytes, Address address,
                    bool on_device, std::size_t size_bytes) {
  auto use = self.use({{offset_bytes, size_bytes}}, true);
  copy_in(*self.arena()->driver(), stream, self.address() + offset_bytes, {address, on_device},
          size_bytes);
}

void region_copy_out(Region& self, Stream const& stream, std::size_t offset_bytes, Address address,
                     bool on_device, std::size_t size_bytes) {
  auto use = self.use({{offset_bytes, size_bytes}});
  copy_out(*self.arena()->driver(), stream, {address, on_device}, self.address() + offset_bytes,
           size_bytes);
}

void shared_copy_in(SharedRegion& self, Stream const& stream, std::size_t offset_bytes,
                    Address address, bool on_device, std::size_t size_bytes) {
  if (self.read_only()) throw LifecycleError("copy_from: the shared region was opened read-only");
  auto use = self.export_range({offset_bytes, size_bytes});
  copy_in(*self.driver(), stream, self.address() + offset_bytes, {address, on_device}, size_bytes);
}

void shared_copy_out(SharedRegion& self, Stream const& stream, std::size_t offset_bytes,
                     Address address, bool on_device, std::size_t size_bytes) {
  auto use = self.export_range({offset_bytes, size_bytes});
  copy_out(*self.driver(), stream, {address, on_device}, self.address() + offset_bytes, size_bytes);
}

// (descriptor, offset_bytes, size_bytes)
using HandleTuple = std::tuple<int, std::size_t, std::size_t>;

std::vector<HandleTuple> export_handles(Region& self) {
  std::vector<HandleTuple> tuples;
  for (auto const& handle : self.export_handles()) {
    tuples.emplace_back(handle.fd, handle.offset_bytes, handle.size_bytes);
  }
  return tuples;
}

std::shared_ptr<SharedRegion> open_shared_region(std::shared_ptr<Driver> driver,
                                                 std::size_t size_bytes,
                                                 std::vector<HandleTuple> const& handles,
                                                 bool read_only) {
  std::vector<SharedHandle> shared;
  for (auto const& [fd, offset, bytes] : handles) shared.push_back({fd, offset, bytes});
  return std::make_shared<SharedRegion>(std::move(driver), size_bytes, shared, read_only);
}

// What both kinds of regions offer to those who want their bytes.
template <typename Bound, typename Dlpack, typename Copy>
void add_views(Bound& bound, Dlpack dlpack, Copy in, Copy out) {
  auto add_copy = [&](char const* name, Copy copy) {
    bound.def(name, copy, py::kw_only(), py::arg("stream"), py::arg("offset_bytes"),
              py::arg("address"), py::arg("on_device"), py::arg("size_bytes"), ReleaseGil());
  };
  add_copy("copy_in", in);
  add_copy("copy_out", out);
  bound.def("dlpack", dlpack, py::kw_only(), py::arg("offset_bytes"), py::arg("shape"),
            py::arg("type_code"), py::arg("type_bits"), py::arg("versioned"));
}

std::vector<std::pair<std::size_t, std::size_t>> pairs(std::vector<Range> const& ranges) {
  std::vector<std::pair<std::size_t, std::size_t>> pairs;
  for (auto const& range : ranges) pairs.emplace_back(range.offset_bytes, range.size_bytes);
  return pairs;
}

// Hooks run with the GIL, which the call of a Python function takes by itself.
using PythonHook = std::function<void(std::size_t, std::size_t)>;

Region::Hook native_hook(std::optional<PythonHook> hook) {
  if (!hook) return {};
  return
      [hook = *std::move(hook)](Range const& range) { hook(range.offset_bytes, range.size_bytes); };
}

std::uint64_t add_hooks(Region& self, std::optional<PythonHook> before_unmap,
                        std::optional<PythonHook> after_map) {
  return self.add_hooks(native_hook(std::move(before_unmap)), native_hook(std::move(after_map)));
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

  py::class_<Stream>(module, "Stream", py::release_gil_before_calling_cpp_dtor())
      .def(py::init<std::shared_ptr<Driver>>(), py::arg("driver"), ReleaseGil())
      .def_property_readonly("id", &Stream::id);

  // The end of a region may have to wait for the device, and that of either for a lock.
  py::class_<Arena, std::shared_ptr<Arena>> arena(module, "Arena",
                                                  py::release_gil_before_calling_cpp_dtor());
  py::class_<Region, std::shared_ptr<Region>> region(module, "Region",
                                                     py::release_gil_before_calling_cpp_dtor());
  py::native_enum<Contents>(module, "Contents", "enum.Enum")
      .value("ZERO", Contents::kZero)
      .value("POISON", Contents::kPoison)
      .value("PRESERVE", Contents::kPreserve)
      .finalize();
  py::class_<Step>(module, "Step")
      .def_static(
          "map",
          [](std::shared_ptr<Region> target, std::size_t offset_bytes,
             std::optional<std::size_t> size_bytes, Contents contents, bool read_only) {
            return Step{Step::Kind::kMap, std::move(target), offset_bytes,
                        size_bytes,       contents,          read_only};
          },
          py::arg("region"), py::kw_only(), py::arg("offset_bytes"), py::arg("size_bytes"),
          py::arg("contents"), py::arg("read_only"))
      .def_static(
          "unmap",
          [](std::shared_ptr<Region> target, std::size_t offset_bytes,
             std::optional<std::size_t> size_bytes) {
            return Step{.kind = Step::Kind::kUnmap,
                        .region = std::move(target),
                        .offset_bytes = offset_bytes,
                        .size_bytes = size_bytes};
          },
          py::arg("region"), py::kw_only(), py::arg("offset_bytes"), py::arg("size_bytes"));
  py::class_<Region::Hold>(module, "Hold", py::release_gil_before_calling_cpp_dtor())
      .def("end", &Region::Hold::end, ReleaseGil());

  arena
      .def(py::init<std::shared_ptr<Driver>, std::size_t, std::optional<std::size_t>, bool, bool>(),
           py::arg("driver"), py::kw_only(), py::arg("capacity_bytes"), py::arg("handle_bytes"),
           py::arg("poison"), py::arg("exportable"))
      .def("reserve", &Arena::reserve, py::kw_only(), py::arg("size_bytes"), py::arg("owner"),
           py::arg("tag"), ReleaseGil())
      .def("set_limit", &Arena::set_limit, py::kw_only(), py::arg("owner"), py::arg("min_bytes"),
           py::arg("max_bytes"), py::arg("pinned"), ReleaseGil())
      .def("commit", &Arena::commit, py::arg("steps"), ReleaseGil())
      .def(
          "check",
          [](Arena& self, std::vector<Step> steps) -> py::object {
            std::optional<Shortage> shortage;
            {
              py::gil_scoped_release unlocked;  // another thread may hold the mutex for long
              shortage = self.check(std::move(steps));
            }
            return shortage ? shortage_as_python(*shortage) : py::none();
          },
          py::arg("steps"))
      .def("stats", &Arena::stats, ReleaseGil())
      .def("close", &Arena::close, py::kw_only(), py::arg("abandon_views"), ReleaseGil())
      .def_property_readonly("driver", &Arena::driver)
      .def_property_readonly("capacity_bytes", &Arena::capacity_bytes)
      .def_property_readonly("handle_bytes", &Arena::handle_bytes);

  region.def("close", &Region::close, py::kw_only(), py::arg("abandon_views"), ReleaseGil())
      .def("export_handles", &export_handles, ReleaseGil())
      .def("protect", &Region::protect, py::kw_only(), py::arg("offset_bytes"),
           py::arg("size_bytes"), py::arg("read_only"), ReleaseGil())
      .def("open_window", &Region::open_window, ReleaseGil())
      .def("close_window", &Region::close_window, ReleaseGil())
      .def("record", &Region::record, py::arg("stream"), ReleaseGil())
      .def("hold", &Region::hold, py::arg("reason"), ReleaseGil())
      .def("add_hooks", &add_hooks, py::kw_only(), py::arg("before_unmap"), py::arg("after_map"),
           ReleaseGil())
      .def("remove_hooks", &Region::remove_hooks, py::arg("id"), ReleaseGil())
      .def_property_readonly("address", &Region::address)
      .def_property_readonly("size_bytes", &Region::size_bytes)
      .def_property_readonly("mapped_bytes", &Region::mapped_bytes)
      .def(
          "mapped_ranges", [](Region const& self) { return pairs(self.mapped_ranges()); },
          ReleaseGil())
      .def(
          "read_only_ranges", [](Region const& self) { return pairs(self.read_only_ranges()); },
          ReleaseGil())
      .def_property_readonly("generation", &Region::generation)
      .def_property_readonly("closed", &Region::closed)
      .def_property_readonly("owner", &Region::owner)
      .def_property_readonly("tag", &Region::tag);
  add_views(region, &region_dlpack, &region_copy_in, &region_copy_out);

  py::class_<AliasSet, std::shared_ptr<AliasSet>>(module, "AliasSet",
                                                  py::release_gil_before_calling_cpp_dtor())
      .def(py::init(&AliasSet::create), py::arg("arena"), py::kw_only(), py::arg("slot_bytes"),
           py::arg("owners"), py::arg("tag"), py::arg("debug"), ReleaseGil())
      .def("region", &AliasSet::region, py::arg("owner"), ReleaseGil())
      .def("give", &AliasSet::give, py::arg("owner"), py::kw_only(), py::arg("contents"),
           ReleaseGil())
      .def("close", &AliasSet::close, py::kw_only(), py::arg("abandon_views"), ReleaseGil())
      .def("owner", &AliasSet::owner, ReleaseGil());

  py::class_<SharedRegion, std::shared_ptr<SharedRegion>> shared(
      module, "SharedRegion", py::release_gil_before_calling_cpp_dtor());
  shared
      .def(py::init(&open_shared_region), py::arg("driver"), py::kw_only(), py::arg("size_bytes"),
           py::arg("handles"), py::arg("read_only"), ReleaseGil())
      .def("close", &SharedRegion::close, py::kw_only(), py::arg("abandon_views"), ReleaseGil())
      .def(
          "mapped_ranges", [](SharedRegion const& self) { return pairs(self.mapped_ranges()); },
          ReleaseGil())
      .def_property_readonly("address", &SharedRegion::address)
      .def_property_readonly("size_bytes", &SharedRegion::size_bytes)
      .def_property_readonly("read_only", &SharedRegion::read_only)
      .def_property_readonly("closed", &SharedRegion::closed);
  add_views(shared, &shared_dlpack, &shared_copy_in, &shared_copy_out);

  py::class_<DLPackImport>(module, "DLPackImport")
      .def(py::init<py::capsule>(), py::arg("capsule"))
      .def_readonly("address", &DLPackImport::address)
      .def_readonly("size_bytes", &DLPackImport::size_bytes)
      .def_readonly("contiguous", &DLPackImport::contiguous)
      .def_readonly("read_only", &DLPackImport::read_only);
}

}  // namespace aegaeon
