// What the binding files share. Defaults of arguments live in the Python wrappers only: functions
// bound here take theirs by keyword, without defaults.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "transfer/parallel.hpp"
#include "vmm/arena.hpp"

namespace aegaeon {

namespace py = pybind11;

// Everything that can wait (for the driver, a lock, a copy) lets other Python threads run: one of
// them may be what it waits for.
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

void bind_driver(py::module_& module);
void bind_file_reader(py::module_& module);
void bind_host_image(py::module_& module);
void bind_kv(py::module_& module);
void bind_torch(py::module_& module);
void bind_transfer(py::module_& module);
void bind_vmm(py::module_& module);
void register_errors();
py::object shortage_as_python(Shortage const& shortage);

// Calls on_progress, if there is one, and notices Ctrl-C. Progress comes to the thread that called,
// which holds no GIL. The function has to outlive what is returned.
Progress python_progress(std::optional<py::function> const& on_progress);

// A DLPack capsule of a C-contiguous tensor; `keep` lives as long as the tensor does.
struct DLPackType {
  std::uint8_t code = 0;
  std::uint8_t bits = 0;
};
std::size_t dlpack_bytes(std::vector<std::int64_t> const& shape, std::size_t type_bits);
// driver: whose memory it is; null for ordinary host memory.
py::capsule make_dlpack(Driver const* driver, Address address, std::vector<std::int64_t> shape,
                        DLPackType type, bool versioned, bool read_only,
                        std::shared_ptr<void> keep);
std::pair<int, int> dlpack_device(Driver const& driver);

// The memory of somebody else's tensor, which lives as long as this does. The GIL is held.
class DLPackImport {
 public:
  // Throws std::invalid_argument: a capsule that is not, or no longer, a tensor.
  explicit DLPackImport(py::capsule const& capsule);

  Address address = 0;
  std::size_t size_bytes = 0;
  bool contiguous = true;  // in C's order
  bool read_only = false;

 private:
  std::shared_ptr<void> tensor_;
};

}  // namespace aegaeon
