// Native errors become the classes of aegaeon_kernels.errors, with their attributes.
#include "error.hpp"

#include <pybind11/stl.h>

#include <cstring>
#include <system_error>

#include "bindings/bindings.hpp"
#include "vmm/shortage.hpp"

namespace aegaeon {
namespace {

py::object error_class(char const* name) {
  return py::module_::import("aegaeon_kernels.errors").attr(name);
}

void raise(char const* name, Error const& error) {
  // A message may have a file's name in it, which need not be UTF-8.
  auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(
      error.what(), static_cast<Py_ssize_t>(std::strlen(error.what())), "backslashreplace"));
  PyErr_SetObject(error_class(name).ptr(), text.ptr());
}

py::list as_python(std::vector<RegionRange> const& ranges) {
  auto type = error_class("RegionRange");
  py::list list;
  for (auto const& range : ranges) {
    list.append(type(range.owner, range.tag, range.offset_bytes, range.size_bytes));
  }
  return list;
}

void raise(char const* name, DriverError const& error, py::kwargs more = {}) {
  using py::literals::operator""_a;
  auto type = error_class(name);
  auto instance = type(error.what(), "call"_a = error.call, "code"_a = error.code,
                       "bytes"_a = error.bytes, "quarantined"_a = as_python(error.quarantined),
                       "lost_contents"_a = as_python(error.lost_contents), **more);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void raise(FileError const& error) {
  auto text = concat("cannot ", error.action, ": ", std::generic_category().message(error.code));
  auto path = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(
      error.path.data(), static_cast<Py_ssize_t>(error.path.size())));
  // OSError chooses its subclass (FileNotFoundError, ...) by the number.
  PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, text, path).ptr());
}

void raise(char const* name, OutOfMemory const& error) {
  py::kwargs more;
  if (error.shortage) more["shortage"] = shortage_as_python(*error.shortage);
  raise(name, error, more);
}

char const* name_of(ShortageReason reason) {
  switch (reason) {
    case ShortageReason::kCapacity:
      return "capacity";
    case ShortageReason::kOwnerMaximum:
      return "owner_maximum";
    case ShortageReason::kOtherMinima:
      return "other_minima";
  }
  return "";
}

}  // namespace

py::object shortage_as_python(Shortage const& shortage) {
  using py::literals::operator""_a;
  auto entry = error_class("Evictable");
  py::list evictable;
  for (auto const& [owner, tag, bytes] : shortage.evictable) {
    evictable.append(entry(owner, tag, bytes));
  }
  return error_class("Shortage")(
      "reason"_a = name_of(shortage.reason), "owner"_a = shortage.owner, "tag"_a = shortage.tag,
      "requested_bytes"_a = shortage.requested_bytes, "missing_bytes"_a = shortage.missing_bytes,
      "free_bytes"_a = shortage.free_bytes, "holders"_a = shortage.holders,
      "evictable"_a = evictable, "why_none"_a = shortage.why_none, "message"_a = shortage.message);
}

void register_errors() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (OutOfMemory const& error) {
      raise("OutOfMemory", error);
    } catch (DriverError const& error) {
      raise("DriverError", error);
    } catch (LifecycleError const& error) {
      raise("LifecycleError", error);
    } catch (IntegrityError const& error) {
      raise("IntegrityError", error);
    } catch (FileError const& error) {
      raise(error);
    } catch (TransferCancelled const& error) {
      raise("TransferCancelled", error);
    } catch (Error const& error) {
      raise("Error", error);
    }
  });
}

}  // namespace aegaeon
