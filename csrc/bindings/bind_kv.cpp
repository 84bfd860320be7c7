#include <pybind11/numpy.h>

#include "bindings/bindings.hpp"
#include "error.hpp"
#include "kv/page_copy.hpp"

namespace aegaeon {
namespace {

// Rows of int64 as they come from numpy; never converted, since a copy would be silently slow.
using Rows = py::array_t<std::int64_t, py::array::c_style>;

template <typename Row>
std::span<Row const> rows_of(Rows const& array, char const* name) {
  constexpr auto kColumns = static_cast<py::ssize_t>(sizeof(Row) / sizeof(std::int64_t));
  if (array.ndim() != 2 || array.shape(1) != kColumns) {
    throw std::invalid_argument(concat(name, " has to have rows of ", kColumns, " int64"));
  }
  return {reinterpret_cast<Row const*>(array.data()), static_cast<std::size_t>(array.shape(0))};
}

void copy_pages_of_rows(Rows const& planes, std::size_t page_bytes, Rows const& moves,
                        std::size_t num_threads) {
  auto plane_pairs = rows_of<PlanePair>(planes, "planes");
  auto block_moves = rows_of<BlockMove>(moves, "moves");
  if (page_bytes == 0) throw std::invalid_argument("page_bytes is 0");
  py::gil_scoped_release unlocked;  // the arrays are kept alive by the caller's references
  copy_pages(plane_pairs, page_bytes, block_moves, num_threads);
}

}  // namespace

void bind_kv(py::module_& module) {
  module.def("copy_pages", &copy_pages_of_rows, py::kw_only(), py::arg("planes").noconvert(),
             py::arg("page_bytes"), py::arg("moves").noconvert(), py::arg("num_threads"));
}

}  // namespace aegaeon
