// Native errors become the classes of aegaeon_kernels.errors, with their attributes.
#include "error.hpp"

#include <cstring>
#include <system_error>

#include "bindings/bindings.hpp"

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

void raise(char const* name, DriverError const& error) {
  using py::literals::operator""_a;
  auto type = error_class(name);
  auto instance =
      type(error.what(), "call"_a = error.call, "code"_a = error.code, "bytes"_a = error.bytes);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void raise(FileError const& error) {
  auto text = concat("cannot ", error.action, ": ", std::generic_category().message(error.code));
  auto path = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(
      error.path.data(), static_cast<Py_ssize_t>(error.path.size())));
  // OSError chooses its subclass (FileNotFoundError, ...) by the number.
  PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code, text, path).ptr());
}

}  // namespace

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
