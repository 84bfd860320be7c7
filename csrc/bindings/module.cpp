#include "bindings/bindings.hpp"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of aegaeon_kernels; the Python modules are the API.";
  aegaeon::register_errors();
  aegaeon::bind_driver(module);
  aegaeon::bind_vmm(module);
  aegaeon::bind_host_image(module);
  aegaeon::bind_transfer(module);
  aegaeon::bind_torch(module);
  aegaeon::bind_kv(module);
  aegaeon::bind_file_reader(module);
}
