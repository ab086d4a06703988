#include "bindings/memory.hpp"

#include <string>

#include "bindings/dlpack.hpp"
#include "bindings/module.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

// The head of DLPack's exchange table (https://dmlc.github.io/dlpack), major version 1: how a library describes one of
// its tensors without making anything. torch has it from 2.10 on.
struct ExchangeTable {
  std::uint32_t major, minor;
  ExchangeTable* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*describe)(void* object, DLTensor* out);
  void* current_stream;
};
using Describe = decltype(ExchangeTable::describe);

Describe find_describe(PyTypeObject* type) {
  const auto capsule = py::reinterpret_steal<py::object>(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!capsule || PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") == 0) {
    PyErr_Clear();
    return nullptr;
  }
  auto* table = static_cast<ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table != nullptr && table->major > 1) table = table->previous;
  return table == nullptr || table->major != 1 ? nullptr : table->describe;
}

// The last type asked for is remembered, and held, so that no other one can come to lie at its address.
Describe describe_of(PyTypeObject* type) {
  static PyTypeObject* known = nullptr;
  static Describe found = nullptr;
  if (type == known) return found;
  found = find_describe(type);
  Py_INCREF(type);
  Py_XDECREF(std::exchange(known, type));
  return found;
}

bool in_a_row(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t expected = 1;
  for (std::int32_t at = tensor.ndim; at-- > 0; expected *= tensor.shape[at])
    if (tensor.shape[at] != 1 && tensor.strides[at] != expected) return false;
  return true;
}

void need_row(bool holds) { check_value(holds, "a strided tensor was passed for memory: pass tensor.contiguous()"); }

bool from_table(Describe describe, py::handle source, Memory& memory) {
  DLTensor tensor{};
  if (describe(source.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  std::int64_t numel = 1;
  for (std::int32_t at = 0; at < tensor.ndim; ++at) numel *= tensor.shape[at];
  need_row(numel == 0 || in_a_row(tensor));
  memory.address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
  memory.bytes = numel * ((tensor.dtype_bits * tensor.dtype_lanes + 7) / 8);
  memory.on_host = tensor.device_type == 1 || tensor.device_type == 3;  // the CPU's, pageable or pinned
  return true;
}

// For torch before 2.10, and for tensors that DLPack cannot describe.
bool from_attributes(py::handle source, Memory& memory) {
  const py::object torch = py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch").ptr()));
  PyErr_Clear();
  if (!torch || !py::isinstance(source, torch.attr("Tensor"))) return false;
  need_row(source.attr("is_contiguous")().cast<bool>());
  memory.address = source.attr("data_ptr")().cast<std::uintptr_t>();
  memory.bytes = source.attr("nbytes").cast<std::int64_t>();
  memory.on_host = source.attr("device").attr("type").cast<std::string>() == "cpu";
  return true;
}

}  // namespace

bool read_memory(py::handle source, Memory& memory) {
  const Describe describe = describe_of(Py_TYPE(source.ptr()));
  if ((describe == nullptr || !from_table(describe, source, memory)) && !from_attributes(source, memory)) return false;
  memory.owner = py::reinterpret_borrow<py::object>(source);
  check_value(memory.address != 0 || memory.bytes == 0, "a tensor of ", memory.bytes,
              " bytes has no memory: it is on no device, or its storage was freed");
  return true;
}

std::uintptr_t Memory::holding(std::int64_t count, std::int64_t size, const char* what) const {
  check_value(bytes / size >= count, what, " has ", bytes, " bytes, and ", count, " elements of ", size,
              " are needed there: pass a tensor of that length");
  check_value(count == 0 || address % static_cast<std::uintptr_t>(size) == 0, what,
              " is not aligned to its elements of ", size, " bytes: pass a tensor that owns its memory");
  return address;
}

std::uintptr_t Memory::host(std::int64_t count, std::int64_t size, const char* what) const {
  check_value(on_host, what, " is not on the CPU, where this call works: pass it to paci_rt.kernels, or move it");
  return holding(count, size, what);
}

std::shared_ptr<void> kept_alive(py::object object) {
  return {object.release().ptr(), [](void* held) {
            if (Py_IsInitialized() == 0) return;
            const py::gil_scoped_acquire gil;
            Py_XDECREF(static_cast<PyObject*>(held));
          }};
}

std::shared_ptr<void> pinned(const Memory& memory) {
  if (!memory.owner || !memory.on_host) return kept_alive(memory.owner);
  // torch lets no storage be resized that an array of numpy looks at.
  return kept_alive(memory.owner.attr("detach")().attr("numpy")());
}

std::vector<std::uintptr_t> addresses_for(const Layout& layout, const std::vector<Memory>& tensors) {
  check_value(tensors.size() == layout.tensors.size(), tensors.size(), " tensors for ", layout.tensors.size(),
              " that the message describes: give one for each, None for absent ones");
  std::vector<std::uintptr_t> addresses;
  addresses.reserve(tensors.size());
  for (std::size_t at = 0; at < tensors.size(); ++at) {
    const std::int64_t bytes = layout.tensors[at].bytes();
    check_value(tensors[at].bytes >= bytes, "tensor ", at, " of the message has ", tensors[at].bytes,
                " bytes, and its description says ", bytes, ": describe the tensors that are sent");
    addresses.push_back(tensors[at].address);
  }
  return addresses;
}

}  // namespace paci_rt
