// Native errors become the classes of aegaeon_kernels.errors, with their attributes.
#include "error.hpp"

#include "bindings/bindings.hpp"

namespace aegaeon {
namespace {

py::object error_class(char const* name) {
  return py::module_::import("aegaeon_kernels.errors").attr(name);
}

void raise(char const* name, Error const& error) {
  py::set_error(error_class(name), error.what());
}

void raise(char const* name, DriverError const& error) {
  using py::literals::operator""_a;
  auto type = error_class(name);
  auto instance =
      type(error.what(), "call"_a = error.call, "code"_a = error.code, "bytes"_a = error.bytes);
  PyErr_SetObject(type.ptr(), instance.ptr());
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
    } catch (TransferCancelled const& error) {
      raise("TransferCancelled", error);
    } catch (Error const& error) {
      raise("Error", error);
    }
  });
}

}  // namespace aegaeon
