// The part of DLPack 1.0 needed to hand out memory
// (https://dmlc.github.io/dlpack/latest/c_api.html): these structures are its ABI, so no header is
// fetched for them.
#include <functional>
#include <numeric>
#include <utility>

#include "bindings/bindings.hpp"
#include "error.hpp"

namespace aegaeon {
namespace {

struct DLTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  static constexpr char const* kName = "dltensor";
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned {
  static constexpr char const* kName = "dltensor_versioned";
  std::uint32_t major;
  std::uint32_t minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor tensor;
};

constexpr std::uint64_t kReadOnlyFlag = 1;
constexpr int kDLCPU = 1, kDLCUDA = 2;

template <typename Managed>
struct Exported {
  Managed managed{};
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  std::shared_ptr<void> keep;
};

template <typename Managed>
py::capsule export_as(DLTensor const& tensor, std::vector<std::int64_t> shape, bool read_only,
                      std::shared_ptr<void> keep) {
  auto exported = std::make_unique<Exported<Managed>>();
  exported->shape = std::move(shape);
  exported->strides.resize(exported->shape.size());
  std::int64_t stride = 1;
  for (auto axis = exported->shape.size(); axis-- > 0;) {
    exported->strides[axis] = stride;
    stride *= exported->shape[axis];
  }
  exported->keep = std::move(keep);
  auto& managed = exported->managed;
  managed.tensor = tensor;
  managed.tensor.ndim = static_cast<std::int32_t>(exported->shape.size());
  managed.tensor.shape = exported->shape.data();
  managed.tensor.strides = exported->strides.data();
  managed.context = exported.get();
  managed.deleter = [](Managed* self) { delete static_cast<Exported<Managed>*>(self->context); };
  if constexpr (requires { managed.flags; }) {
    managed.major = 1;
    managed.minor = 0;
    managed.flags = read_only ? kReadOnlyFlag : 0;
  } else {
    static_cast<void>(read_only);
  }
  // Who takes the tensor renames the capsule and calls the deleter; one that nobody took does it.
  py::capsule capsule(&managed, Managed::kName, [](PyObject* object) {
    if (PyCapsule_IsValid(object, Managed::kName) == 0) return;
    auto* left = static_cast<Managed*>(PyCapsule_GetPointer(object, Managed::kName));
    left->deleter(left);
  });
  static_cast<void>(exported.release());
  return capsule;
}

// Takes the tensor out of the capsule, if it is one of that kind.
template <typename Managed>
std::shared_ptr<Managed> taken_as(py::capsule const& capsule, char const* used_name) {
  if (PyCapsule_IsValid(capsule.ptr(), Managed::kName) == 0) return nullptr;
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), Managed::kName));
  if (PyCapsule_SetName(capsule.ptr(), used_name) != 0) throw py::error_already_set();
  return {managed, [](Managed* self) {
            if (self->deleter != nullptr) self->deleter(self);
          }};
}

}  // namespace

DLPackImport::DLPackImport(py::capsule const& capsule) {
  DLTensor const* tensor = nullptr;
  if (auto versioned = taken_as<DLManagedTensorVersioned>(capsule, "used_dltensor_versioned")) {
    if (versioned->major != 1) {
      throw std::invalid_argument(
          concat("a tensor of DLPack ", versioned->major, ", which is not 1"));
    }
    tensor = &versioned->tensor;
    read_only = (versioned->flags & kReadOnlyFlag) != 0;
    tensor_ = std::move(versioned);
  } else if (auto plain = taken_as<DLManagedTensor>(capsule, "used_dltensor")) {
    tensor = &plain->tensor;
    tensor_ = std::move(plain);
  } else {
    throw std::invalid_argument("the capsule holds no DLPack tensor, or it has been taken");
  }
  std::int64_t count = 1;
  for (auto axis = tensor->ndim; axis-- > 0;) {
    if (tensor->strides != nullptr && tensor->shape[axis] != 1 && tensor->strides[axis] != count) {
      contiguous = false;
    }
    count *= tensor->shape[axis];
  }
  address = reinterpret_cast<Address>(tensor->data) + tensor->byte_offset;
  size_bytes = (static_cast<std::size_t>(count) * tensor->type_bits * tensor->type_lanes + 7) / 8;
}

std::pair<int, int> dlpack_device(Driver const& driver) {
  return driver.kind() == DeviceKind::kCuda ? std::pair{kDLCUDA, driver.device_index()}
                                            : std::pair{kDLCPU, 0};
}

std::size_t dlpack_bytes(std::vector<std::int64_t> const& shape, std::size_t type_bits) {
  auto count = std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  return static_cast<std::size_t>(count) * type_bits / 8;
}

py::capsule make_dlpack(Driver const* driver, Address address, std::vector<std::int64_t> shape,
                        DLPackType type, bool versioned, bool read_only,
                        std::shared_ptr<void> keep) {
  auto [device_type, device_id] = driver != nullptr ? dlpack_device(*driver) : std::pair{kDLCPU, 0};
  DLTensor tensor{};
  tensor.data = reinterpret_cast<void*>(address);
  tensor.device_type = device_type;
  tensor.device_id = device_id;
  tensor.type_code = type.code;
  tensor.type_bits = type.bits;
  tensor.type_lanes = 1;
  if (versioned) {
    return export_as<DLManagedTensorVersioned>(tensor, std::move(shape), read_only,
                                               std::move(keep));
  }
  return export_as<DLManagedTensor>(tensor, std::move(shape), read_only, std::move(keep));
}

}  // namespace aegaeon
