#include <pybind11/stl.h>

#include <utility>

#include "bindings/bindings.hpp"
#include "error.hpp"
#include "transfer/crc32c.hpp"
#include "transfer/host_image.hpp"

namespace aegaeon {
namespace {

py::capsule image_dlpack(HostImage& self, std::size_t offset_bytes, std::vector<std::int64_t> shape,
                         std::uint8_t type_code, std::uint8_t type_bits, bool versioned) {
  auto size = dlpack_bytes(shape, type_bits);
  if (offset_bytes > self.size_bytes() || size > self.size_bytes() - offset_bytes) {
    throw std::invalid_argument(concat(size, " bytes at offset ", offset_bytes,
                                       " do not fit in the image of ", self.size_bytes()));
  }
  auto address = reinterpret_cast<Address>(self.data() + offset_bytes);
  return make_dlpack(nullptr, address, std::move(shape), {type_code, type_bits}, versioned,
                     self.sealed(), self.shared_from_this());
}

}  // namespace

void bind_host_image(py::module_& module) {
  py::class_<HostImage, std::shared_ptr<HostImage>>(module, "HostImage", py::buffer_protocol())
      .def(py::init<std::shared_ptr<Driver>, std::size_t, std::string>(), py::arg("driver"),
           py::kw_only(), py::arg("size_bytes"), py::arg("name"), ReleaseGil())
      .def_buffer([](HostImage& self) {
        return py::buffer_info(self.data(), 1, py::format_descriptor<std::uint8_t>::format(), 1,
                               {self.size_bytes()}, {std::size_t{1}}, self.sealed());
      })
      .def_property_readonly(
          "address", [](HostImage const& self) { return reinterpret_cast<Address>(self.data()); })
      .def_property_readonly("size_bytes", &HostImage::size_bytes)
      .def_property_readonly("name", &HostImage::name)
      .def_property_readonly("pinned", &HostImage::pinned)
      .def_property_readonly("sealed", &HostImage::sealed)
      .def("checksums", &HostImage::checksums, ReleaseGil())
      .def("dlpack", &image_dlpack, py::kw_only(), py::arg("offset_bytes"), py::arg("shape"),
           py::arg("type_code"), py::arg("type_bits"), py::arg("versioned"))
      .def("seal", &HostImage::seal, ReleaseGil())
      .def("verify", &HostImage::verify, ReleaseGil());

  module.attr("IMAGE_CHUNK_BYTES") = HostImage::kChunkBytes;
  auto bind_checksum = [&](char const* name, auto function) {
    module.def(
        name,
        [function](py::bytes const& data) {
          std::string_view view = data;
          return function(view.data(), view.size());
        },
        py::arg("data"));
  };
  bind_checksum("crc32c", &crc32c);
  bind_checksum("crc32c_portable", &crc32c_portable);
}

}  // namespace aegaeon
