#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "vmm/torch_pool.hpp"

namespace aegaeon {

void bind_torch(py::module_& module) {
  py::class_<TorchPoolStats>(module, "TorchPoolStats")
      .def_readonly("allocated_bytes", &TorchPoolStats::allocated_bytes)
      .def_readonly("num_pieces", &TorchPoolStats::num_pieces)
      .def_readonly("largest_free_bytes", &TorchPoolStats::largest_free_bytes)
      .def_readonly("num_failed", &TorchPoolStats::num_failed)
      .def_readonly("last_failure", &TorchPoolStats::last_failure);

  py::class_<TorchPool, std::shared_ptr<TorchPool>>(module, "TorchPool")
      .def(py::init<std::vector<std::shared_ptr<Region>>>(), py::arg("regions"))
      .def("activate", &TorchPool::activate)
      .def("deactivate", &TorchPool::deactivate)
      .def("trim", &TorchPool::trim, ReleaseGil())
      .def("stats", &TorchPool::stats, ReleaseGil());
}

}  // namespace aegaeon
