#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <span>
#include <utility>

#include "bindings/bindings.hpp"
#include "error.hpp"
#include "transfer/crc32c.hpp"
#include "transfer/host_image.hpp"
#include "transfer/host_pages.hpp"
#include "transfer/host_pool.hpp"
#include "transfer/image_directory.hpp"
#include "transfer/image_file.hpp"

namespace aegaeon {

Progress python_progress(std::optional<py::function> const& on_progress) {
  return [&on_progress](std::size_t num_done) {
    py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (on_progress) (*on_progress)(num_done);
  };
}

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

void bind_image(py::module_& module) {
  py::class_<HostImage, std::shared_ptr<HostImage>>(module, "HostImage", py::buffer_protocol())
      .def(py::init<std::shared_ptr<Driver>, std::size_t, std::string>(), py::arg("driver"),
           py::kw_only(), py::arg("size_bytes"), py::arg("name"), ReleaseGil())
      .def(py::init([](HostPool& pool, std::size_t size_bytes, std::string name) {
             auto memory = pool.allocate(size_bytes, name);
             return std::make_shared<HostImage>(std::move(memory), std::move(name));
           }),
           py::arg("pool"), py::kw_only(), py::arg("size_bytes"), py::arg("name"), ReleaseGil())
      .def(py::init([](std::shared_ptr<SharedImage> const& shared, std::string name) {
             auto image = std::make_shared<HostImage>(SharedImage::memory(shared), std::move(name));
             if (shared->opened()) image->seal_as(shared->footer());
             return image;
           }),
           py::arg("shared"), py::kw_only(), py::arg("name"))
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
      .def("copyable_bytes", &HostImage::copyable_bytes, py::arg("offset_bytes"))
      .def("get_metadata", [](HostImage const& self) { return py::bytes(self.metadata()); })
      .def("set_metadata", &HostImage::set_metadata, py::arg("json"))
      .def("get_layout", [](HostImage const& self) { return py::bytes(self.layout()); })
      .def("set_layout", &HostImage::set_layout, py::arg("json"))
      .def("checksums", &HostImage::checksums, ReleaseGil())
      .def("dlpack", &image_dlpack, py::kw_only(), py::arg("offset_bytes"), py::arg("shape"),
           py::arg("type_code"), py::arg("type_bits"), py::arg("versioned"))
      .def(
          "seal",
          [](HostImage& self, std::size_t num_threads) {
            self.seal(num_threads, python_progress(std::nullopt));
          },
          py::kw_only(), py::arg("num_threads"), ReleaseGil())
      .def(
          "verify",
          [](HostImage const& self, std::size_t num_threads) {
            self.verify(num_threads, python_progress(std::nullopt));
          },
          py::kw_only(), py::arg("num_threads"), ReleaseGil());
  module.attr("IMAGE_CHUNK_BYTES") = HostImage::kChunkBytes;
  module.attr("MAX_METADATA_BYTES") = kMaxMetadataBytes;
  module.attr("MAX_LAYOUT_BYTES") = kMaxLayoutBytes;
}

void bind_host_memory(py::module_& module) {
  py::native_enum<HostMemoryKind>(module, "HostMemoryKind", "enum.Enum")
      .value("NUMA", HostMemoryKind::kNuma)
      .value("HUGETLB", HostMemoryKind::kHugetlb)
      .value("THP", HostMemoryKind::kThp)
      .value("SHM", HostMemoryKind::kShm)
      .value("DRIVER", HostMemoryKind::kDriver)
      .value("PAGEABLE", HostMemoryKind::kPageable)
      .finalize();

  py::class_<HostMemoryAttempt>(module, "HostMemoryAttempt")
      .def_readonly("kind", &HostMemoryAttempt::kind)
      .def_readonly("worked", &HostMemoryAttempt::worked)
      .def_readonly("remark", &HostMemoryAttempt::remark);

  py::class_<HostPoolStats>(module, "HostPoolStats")
      .def_readonly("capacity_bytes", &HostPoolStats::capacity_bytes)
      .def_readonly("free_bytes", &HostPoolStats::free_bytes)
      .def_readonly("largest_free_bytes", &HostPoolStats::largest_free_bytes)
      .def_readonly("num_free_parts", &HostPoolStats::num_free_parts)
      .def_readonly("holders", &HostPoolStats::holders);

  py::class_<HostPool, std::shared_ptr<HostPool>>(module, "HostPool")
      .def(py::init([](std::shared_ptr<Driver> driver, std::size_t capacity_bytes,
                       std::vector<HostMemoryKind> kinds, std::optional<int> numa_node,
                       std::size_t num_threads, std::size_t piece_bytes) {
             HostMemoryOptions options{.kinds = std::move(kinds),
                                       .numa_node = numa_node,
                                       .num_threads = num_threads,
                                       .piece_bytes = piece_bytes};
             return std::make_shared<HostPool>(std::move(driver), capacity_bytes, options);
           }),
           py::arg("driver"), py::kw_only(), py::arg("capacity_bytes"), py::arg("kinds"),
           py::arg("numa_node"), py::arg("num_threads"), py::arg("piece_bytes"), ReleaseGil())
      .def_property_readonly("pinned", &HostPool::pinned)
      .def_property_readonly("attempts", &HostPool::attempts)
      .def("stats", &HostPool::stats, ReleaseGil())
      .def("close", &HostPool::close, ReleaseGil());

  module.attr("REGISTRATION_PIECE_BYTES") = Registration::kPieceBytes;
  module.def("probe_host_memory", &probe_host_memory, py::arg("driver"), ReleaseGil());
  module.def("available_host_bytes", &available_host_bytes, py::kw_only(), py::arg("proc"),
             py::arg("cgroups"), ReleaseGil());
  module.def("default_num_threads", &default_num_threads);
}

using ParsedFooter = std::tuple<std::size_t, std::vector<std::uint32_t>, py::bytes, py::bytes>;

ParsedFooter as_tuple(ImageFooter const& footer) {
  return {footer.payload_bytes, footer.checksums, footer.metadata, footer.layout};
}

void bind_image_file(py::module_& module) {
  py::class_<ImageFile>(module, "ImageFile")
      .def(py::init<std::string>(), py::arg("path"), ReleaseGil())
      .def_property_readonly("size_bytes", &ImageFile::size_bytes)
      .def_property_readonly("footer",
                             [](ImageFile const& self) { return as_tuple(self.footer()); })
      .def(
          "read_into",
          [](ImageFile const& self, HostImage& image, bool verify, std::size_t num_threads,
             std::optional<py::function> const& on_progress) {
            py::gil_scoped_release unlocked;
            self.read_into(image, verify, num_threads, python_progress(on_progress));
          },
          py::arg("image"), py::kw_only(), py::arg("verify"), py::arg("num_threads"),
          py::arg("on_progress"))
      .def("close", &ImageFile::close);

  module.def(
      "save_image",
      [](HostImage const& image, std::string const& path, std::size_t num_threads,
         std::optional<py::function> const& on_progress) {
        py::gil_scoped_release unlocked;
        save_image(image, path, num_threads, python_progress(on_progress));
      },
      py::arg("image"), py::kw_only(), py::arg("path"), py::arg("num_threads"),
      py::arg("on_progress"));
  module.def(
      "parse_image",
      [](py::bytes const& file) {
        std::string_view view = file;
        return as_tuple(parse_image(std::as_bytes(std::span(view)), "image"));
      },
      py::arg("file"));
  module.def(
      "serialize_footer",
      [](std::size_t payload_bytes, std::vector<std::uint32_t> checksums, std::string metadata,
         std::string layout) {
        ImageFooter footer{.payload_bytes = payload_bytes,
                           .checksums = std::move(checksums),
                           .metadata = std::move(metadata),
                           .layout = std::move(layout)};
        auto bytes = footer.serialize();
        return py::bytes(reinterpret_cast<char const*>(bytes.data()), bytes.size());
      },
      py::kw_only(), py::arg("payload_bytes"), py::arg("checksums"), py::arg("metadata"),
      py::arg("layout"));
}

void bind_shared_image(py::module_& module) {
  py::class_<SharedImage, std::shared_ptr<SharedImage>>(module, "SharedImage")
      .def(py::init([](std::shared_ptr<Driver> driver, std::string directory,
                       std::size_t size_bytes, std::size_t num_threads) {
             return std::make_shared<SharedImage>(std::move(driver), ImageDirectory(directory),
                                                  size_bytes, num_threads);
           }),
           py::arg("driver"), py::kw_only(), py::arg("directory"), py::arg("size_bytes"),
           py::arg("num_threads"), ReleaseGil())
      .def(py::init([](std::shared_ptr<Driver> driver, std::string directory, std::string name) {
             return std::make_shared<SharedImage>(std::move(driver), ImageDirectory(directory),
                                                  std::move(name));
           }),
           py::arg("driver"), py::kw_only(), py::arg("directory"), py::arg("name"), ReleaseGil())
      .def_property_readonly("footer",
                             [](SharedImage const& self) { return as_tuple(self.footer()); })
      .def_property_readonly("pin_error", &SharedImage::pin_error)
      .def(
          "publish",
          [](SharedImage& self, HostImage const& image, std::string const& name) {
            self.publish(name, image.footer());
          },
          py::arg("image"), py::kw_only(), py::arg("name"), ReleaseGil())
      .def("unpublish", &SharedImage::unpublish, ReleaseGil())
      .def_property_readonly("published_name", &SharedImage::published_name)
      .def_property_readonly("leased", &SharedImage::leased);

  module.def(
      "shared_image_names",
      [](std::string const& directory) { return ImageDirectory(directory).names(); }, py::kw_only(),
      py::arg("directory"), ReleaseGil());
  module.def(
      "collect_shared_images",
      [](std::string const& directory) { return ImageDirectory(directory).collect_garbage(); },
      py::kw_only(), py::arg("directory"), ReleaseGil());
}

void bind_checksums(py::module_& module) {
  auto bind = [&](char const* name, auto function) {
    module.def(
        name,
        [function](py::bytes const& data, std::uint32_t before) {
          std::string_view view = data;
          return function(view.data(), view.size(), before);
        },
        py::arg("data"), py::kw_only(), py::arg("before"));
  };
  bind("crc32c", &crc32c);
  bind("crc32c_portable", &crc32c_portable);
}

}  // namespace

void bind_host_image(py::module_& module) {
  bind_host_memory(module);
  bind_image(module);
  bind_image_file(module);
  bind_shared_image(module);
  bind_checksums(module);
}

}  // namespace aegaeon
