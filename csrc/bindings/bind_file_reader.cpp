#include <pybind11/stl.h>

#include <span>
#include <string_view>
#include <tuple>
#include <utility>

#include "bindings/bindings.hpp"
#include "transfer/file_reader.hpp"

namespace aegaeon {
namespace {

py::str as_str(std::string_view text) {
  return {text.data(), text.size()};
}

// (header_bytes, [(name, dtype, shape, begin, end)], metadata)
py::tuple as_tuple(SafetensorsHeader const& header) {
  py::list tensors;
  for (auto const& tensor : header.tensors) {
    tensors.append(py::make_tuple(tensor.name, as_str(tensor.dtype.name),
                                  py::tuple(py::cast(tensor.shape)), tensor.begin, tensor.end));
  }
  return py::make_tuple(header.header_bytes, std::move(tensors), header.metadata);
}

using Pieces = std::vector<std::tuple<std::size_t, std::uint64_t, std::size_t, std::size_t>>;

std::unique_ptr<FileReader> make_reader(std::vector<std::shared_ptr<SafetensorsFile>> files,
                                        Pieces const& tuples) {
  std::vector<FilePiece> pieces;
  pieces.reserve(tuples.size());
  for (auto [file_idx, file_offset, image_offset, size_bytes] : tuples) {
    pieces.push_back({file_idx, file_offset, image_offset, size_bytes});
  }
  return std::make_unique<FileReader>(std::move(files), std::move(pieces));
}

}  // namespace

void bind_file_reader(py::module_& module) {
  py::dict dtypes;
  for (auto const& dtype : safetensors_dtypes()) dtypes[as_str(dtype.name)] = dtype.num_bits;
  module.attr("SAFETENSORS_DTYPE_BITS") = dtypes;
  module.attr("MAX_SAFETENSORS_HEADER_BYTES") = kMaxSafetensorsHeaderBytes;
  module.def(
      "parse_safetensors",
      [](py::bytes const& file) {
        std::string_view view = file;
        return as_tuple(parse_safetensors(std::as_bytes(std::span(view)), "safetensors"));
      },
      py::arg("file"));

  py::class_<SafetensorsFile, std::shared_ptr<SafetensorsFile>>(module, "SafetensorsFile")
      .def(py::init<std::string>(), py::arg("path"), ReleaseGil())
      .def_property_readonly("size_bytes", &SafetensorsFile::size_bytes)
      .def_property_readonly("header",
                             [](SafetensorsFile const& self) { return as_tuple(self.header()); })
      .def("require_unchanged", &SafetensorsFile::require_unchanged, ReleaseGil());

  py::class_<FileReader>(module, "FileReader")
      .def(py::init(&make_reader), py::kw_only(), py::arg("files"), py::arg("pieces"))
      .def_property_readonly("num_pieces", &FileReader::num_pieces)
      .def_property_readonly("size_bytes", &FileReader::size_bytes)
      .def(
          "fill",
          [](FileReader const& self, HostImage& image, std::string layout,
             std::vector<FileReader const*> const& comparisons, std::size_t num_threads,
             std::optional<py::function> const& on_progress) {
            py::gil_scoped_release unlocked;
            return self.fill(image, std::move(layout), comparisons, num_threads,
                             python_progress(on_progress));
          },
          py::arg("image"), py::kw_only(), py::arg("layout"), py::arg("comparisons"),
          py::arg("num_threads"), py::arg("on_progress"))
      .def(
          "differences",
          [](FileReader const& self, HostImage const& image, std::size_t num_threads,
             std::optional<py::function> const& on_progress) {
            py::gil_scoped_release unlocked;
            return self.differences(image, num_threads, python_progress(on_progress));
          },
          py::arg("image"), py::kw_only(), py::arg("num_threads"), py::arg("on_progress"));
}

}  // namespace aegaeon
