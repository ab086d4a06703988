#include "cuda/sm_partition.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/module.hpp"

namespace py = pybind11;

namespace paci_rt {

void bind_sm_partition(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<SmPartition>(m, "SmPartition")
      .def_readonly("device", &SmPartition::device)
      .def_readonly("sms", &SmPartition::sms)
      .def(
          "stream", [](const SmPartition& self, int priority) { return make_stream(self, priority); },
          py::arg("priority") = 0, Released())
      // Never destroyed, like torch's own streams: whenever torch's allocator takes a tensor back, even at exit, it
      // records an event on every stream that used the tensor.
      .def(
          "lasting_stream",
          [](const SmPartition& self, int priority) {
            return (new StreamHandle(make_stream(self, priority)))->get().handle;
          },
          py::arg("priority") = 0, Released());
  m.def(
      "sm_counts",
      [](int device) {
        const SmCounts counts = sm_counts(device);
        return std::make_tuple(counts.total, counts.smallest, counts.step);
      },
      py::arg("device"), Released());
  m.def("sm_groups", &sm_groups, py::arg("device"), py::arg("sms"), Released());
  m.def(
      "split_sms",
      [](int device, int count, int sms) {
        SmSplit split = split_sms(device, count, sms);
        return std::make_pair(std::move(split.parts), std::move(split.rest));
      },
      py::arg("device"), py::arg("count"), py::arg("sms"), Released());
  m.def(
      "mark_sms",
      [](int device, StreamArg stream, std::uintptr_t flags, int blocks, std::int64_t microseconds) {
        mark_sms(stream.on(device), flags, blocks, microseconds);
      },
      py::arg("device"), py::arg("stream"), py::arg("flags"), py::arg("blocks"), py::arg("microseconds"), Released());
}

}  // namespace paci_rt
