// What the files that bind the core to Python share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "core/check.hpp"
#include "core/stream.hpp"
#include "cpu/kernels.hpp"

namespace paci_rt {

// Gives the interpreter lock away for a scope, where that is worth it.
class MaybeReleaseGil {
 public:
  explicit MaybeReleaseGil(bool release) {
    if (release) release_ = std::make_unique<pybind11::gil_scoped_release>();
  }
  // Below so many elements, giving it away and asking for it back costs more than the work.
  explicit MaybeReleaseGil(std::int64_t elements) : MaybeReleaseGil(elements >= 65536) {}

 private:
  std::unique_ptr<pybind11::gil_scoped_release> release_;
};

// For objects whose end waits for threads that may need the interpreter lock. Whoever drops the last reference may hold
// it or not.
template <typename T>
void delete_without_gil(T* object) {
  const MaybeReleaseGil release(PyGILState_Check() != 0);
  delete object;
}

// A method that refuses None for its object, which a pointer to a member would take for a null pointer.
template <typename Class, typename Base, typename Result, typename... Args>
auto method(Result (Base::*pointer)(Args...)) {
  return [pointer](Class& self, Args... args) -> Result { return (self.*pointer)(std::forward<Args>(args)...); };
}
template <typename Class, typename Base, typename Result, typename... Args>
auto method(Result (Base::*pointer)(Args...) const) {
  return [pointer](const Class& self, Args... args) -> Result { return (self.*pointer)(std::forward<Args>(args)...); };
}

// The only way to an object of a class is to call the class: `__new__` alone would make one without anything in it.
void no_bare_new(pybind11::handle type);

inline DType dtype_of(int code) {
  check_value(code >= 0 && code <= 2, "dtype code ", code, " is unknown: 0 is fp32, 1 bf16, 2 fp16");
  return static_cast<DType>(code);
}

// A stream as Python passes it: an integer, anything with __cuda_stream__ (a method or a pair, version and handle), or
// a stream of torch before 2.10 or CuPy before 14, which have `cuda_stream` and `ptr` instead.
struct StreamArg {
  std::uintptr_t handle = 0;
  Stream on(int device = kCpu) const { return {device, handle}; }
};

void bind_streams(pybind11::module_& m);      // StreamOps, DeviceOps, Stream, Event, WeightGate, what is known of CUDA
void bind_accumulator(pybind11::module_& m);  // Accumulator
void bind_shm_channel(pybind11::module_& m);  // Endpoint, Outgoing, Incoming and those of shared memory
void bind_device_engine(
    pybind11::module_& m);  // NCCL, DeviceEngine and the ends of its channels; after bind_shm_channel
void bind_sm_partition(pybind11::module_& m);    // SmPartition and how a GPU is split into them; after the streams
void bind_optimizer_step(pybind11::module_& m);  // one update, and the look-ahead
void bind_testing(pybind11::module_& m);         // _testing: only where PACI_RT_TESTING is on; last

void check_signals();  // for waits that gave the interpreter lock away; throws what a signal's handler raised

}  // namespace paci_rt

template <>
struct pybind11::detail::type_caster<paci_rt::StreamArg> {
  PYBIND11_TYPE_CASTER(paci_rt::StreamArg, const_name("object"));

  bool load(handle source, bool) {
    object found = reinterpret_borrow<object>(source);
    if (!PyLong_Check(source.ptr())) found = of_protocol(source);
    value.handle = PyLong_AsSize_t(found.ptr());
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    if (PyLong_Check(found.ptr()) == 0)
      throw type_error("a stream's handle is of type " + std::string(Py_TYPE(found.ptr())->tp_name) +
                       ": pass an integer, or an object with __cuda_stream__");
    throw value_error("stream " + str(found).cast<std::string>() + " is no handle: they are 0 to 2**64 - 1");
  }

 private:
  static object of_protocol(handle source) {
    if (hasattr(source, "__cuda_stream__")) {
      object pair = source.attr("__cuda_stream__");
      if (PyCallable_Check(pair.ptr())) pair = pair();
      return pair[int_(1)];
    }
    if (hasattr(source, "cuda_stream")) return source.attr("cuda_stream");
    // CuPy's arrays' memory has a ptr too, but nothing waits for events on it.
    if (hasattr(source, "wait_event") && hasattr(source, "ptr")) return source.attr("ptr");
    throw type_error(repr(source).cast<std::string>() +
                     " is no stream: pass an integer handle or an object with __cuda_stream__");
  }
};
