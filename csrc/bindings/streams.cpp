#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/module.hpp"
#include "buffers/weight_gate.hpp"
#include "core/device_ops.hpp"
#include "core/event.hpp"
#include "core/stream.hpp"
#include "cuda/cuda_ops.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

using Ops = std::shared_ptr<StreamOps>;
using Released = py::call_guard<py::gil_scoped_release>;

// The CPU's own answer is null; here streams and events are asked for by name, so it is an error.
Ops need_ops(int device, Ops ops) {
  if (!ops) ops = ops_for(device);
  check_value(ops != nullptr, "device ", device, " (the CPU) has neither streams nor events: name a GPU, from 0");
  ops->check_device(device);
  return ops;
}

void bind_stream(py::module_& m) {
  py::class_<StreamHandle>(m, "Stream")
      .def(py::init([](int device, int priority, Ops ops) {
             return StreamHandle::make(need_ops(device, std::move(ops)), device, priority);
           }),
           py::arg("device"), py::arg("priority") = 0, py::arg("ops") = nullptr)
      .def_static(
          "borrow",
          [](int device, StreamArg stream, Ops ops) {
            return StreamHandle::borrow(need_ops(device, std::move(ops)), stream.on(device));
          },
          py::arg("device"), py::arg("stream"), py::arg("ops") = nullptr)
      .def_property_readonly("device", [](const StreamHandle& self) { return self.get().device; })
      .def_property_readonly("handle", [](const StreamHandle& self) { return self.get().handle; })
      .def_property_readonly("owned", method<StreamHandle>(&StreamHandle::owned))
      .def("synchronize", method<StreamHandle>(&StreamHandle::synchronize), Released())
      .def("__cuda_stream__", [](const StreamHandle& self) { return std::make_pair(0, self.get().handle); });
}

void bind_event(py::module_& m) {
  py::class_<Event>(m, "Event")
      .def(py::init([](int device, Ops ops) { return Event(need_ops(device, std::move(ops)), device); }),
           py::arg("device"), py::arg("ops") = nullptr)
      .def_static(
          "borrow",
          [](int device, std::uintptr_t handle, Ops ops) {
            return Event::borrow(need_ops(device, std::move(ops)), device, handle);
          },
          py::arg("device"), py::arg("handle"), py::arg("ops") = nullptr)
      .def_property_readonly("device", method<Event>(&Event::device))
      .def_property_readonly("handle", method<Event>(&Event::handle))
      .def_property_readonly("owned", method<Event>(&Event::owned))
      .def_property_readonly("done", py::cpp_function(method<Event>(&Event::done), Released()))
      .def(
          "record", [](Event& self, StreamArg stream) { self.record(stream.on(self.device())); }, py::arg("stream"),
          Released())
      .def(
          "block",
          [](const Event& self, StreamArg stream, int device) {
            self.block(stream.on(device == kCpu ? self.device() : device));
          },
          py::arg("stream"), py::arg("device") = kCpu, Released())
      .def("synchronize", method<Event>(&Event::synchronize), Released());
}

void bind_weight_gate(py::module_& m) {
  py::class_<WeightGate>(m, "WeightGate")
      .def(py::init([](std::int64_t buckets, int device, Ops ops) {
             return WeightGate(buckets, device, ops ? std::move(ops) : ops_for(device));
           }),
           py::arg("buckets"), py::arg("device") = kCpu, py::arg("ops") = nullptr)
      .def(
          "claim", [](WeightGate& self, StreamArg stream) { self.claim(stream.on()); }, py::arg("stream"), Released())
      .def(
          "publish", [](WeightGate& self, std::int64_t bucket, StreamArg stream) { self.publish(bucket, stream.on()); },
          py::arg("bucket"), py::arg("stream"), Released())
      .def(
          "wait", [](WeightGate& self, std::int64_t bucket, StreamArg stream) { self.wait(bucket, stream.on()); },
          py::arg("bucket"), py::arg("stream"), Released())
      .def(
          "wait_all", [](WeightGate& self, StreamArg stream) { self.wait_all(stream.on()); }, py::arg("stream"),
          Released())
      .def("synchronize", method<WeightGate>(&WeightGate::synchronize), Released())
      .def("published", method<WeightGate>(&WeightGate::published), py::arg("bucket"))
      .def_property_readonly("buckets", method<WeightGate>(&WeightGate::buckets));
}

}  // namespace

void bind_streams(py::module_& m) {
  py::class_<StreamOps, Ops>(m, "StreamOps");
  py::class_<DeviceOps, StreamOps, std::shared_ptr<DeviceOps>>(m, "DeviceOps");
  bind_stream(m);
  bind_event(m);
  bind_weight_gate(m);
  m.attr("cuda") = cuda_info().runtime_version != 0;
  m.attr("cuda_runtime_version") = cuda_info().runtime_version;
  m.attr("cuda_archs") = py::tuple(py::cast(cuda_info().kernel_archs));
  m.def(
      "cuda_devices",
      [] {
        const CudaDevices found = cuda_devices();
        return std::make_pair(found.count, found.reason);
      },
      Released());
  m.def(
      "cuda_spin",
      [](int device, StreamArg stream, std::int64_t microseconds) { cuda_spin(stream.on(device), microseconds); },
      py::arg("device"), py::arg("stream"), py::arg("microseconds"), Released());
  m.def(
      "cuda_fill",
      [](int device, StreamArg stream, std::uintptr_t address, std::int64_t numel, float value) {
        cuda_fill(stream.on(device), address, numel, value);
      },
      py::arg("device"), py::arg("stream"), py::arg("address"), py::arg("numel"), py::arg("value"), Released());
}

}  // namespace paci_rt
