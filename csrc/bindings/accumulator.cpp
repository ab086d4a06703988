#include "buffers/accumulator.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/module.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

using Pairs = std::vector<std::pair<std::int64_t, std::int64_t>>;

std::vector<Segment> segments_of(const Pairs& pairs) {
  std::vector<Segment> segments;
  segments.reserve(pairs.size());
  for (const auto& [offset, numel] : pairs) segments.push_back({offset, numel});
  return segments;
}

Accumulator make(const Pairs& segments, std::int64_t numel, const std::vector<std::uintptr_t>& buffers, int device,
                 std::shared_ptr<StreamOps> ops) {
  if (!ops) ops = ops_for(device);
  return Accumulator(segments_of(segments), numel, buffers, device, std::move(ops));
}

}  // namespace

void bind_accumulator(py::module_& m) {
  // A device may make the caller wait, for room in a stream's queue; on the CPU only `add` and `seal` take time.
  const auto on_device = [](const Accumulator& self) { return !self.on_cpu(); };
  const auto on_stream = [on_device](auto method) {
    return [on_device, method](Accumulator& self, StreamArg stream) {
      const MaybeReleaseGil release(on_device(self));
      return (self.*method)(stream.on());
    };
  };
  const auto released = [](auto getter) { return py::cpp_function(getter, py::call_guard<py::gil_scoped_release>()); };
  py::class_<Accumulator>(m, "Accumulator")
      .def(py::init(&make), py::arg("segments"), py::arg("numel"), py::arg("buffers"), py::arg("device") = kCpu,
           py::arg("ops") = nullptr)
      .def(
          "add",
          [](Accumulator& self, std::int64_t index, std::uintptr_t grad, int dtype, std::int64_t numel,
             StreamArg stream, int threads) {
            const MaybeReleaseGil release(numel);
            self.add(index, grad, dtype_of(dtype), numel, stream.on(), threads);
          },
          py::arg("index"), py::arg("grad"), py::arg("dtype"), py::arg("numel"), py::arg("stream"), py::arg("threads"))
      .def(
          "lend",
          [on_device](Accumulator& self, std::int64_t index, StreamArg stream, int threads) {
            const MaybeReleaseGil release(on_device(self));
            return self.lend(index, stream.on(), threads);
          },
          py::arg("index"), py::arg("stream"), py::arg("threads"))
      .def(
          "lend_many",
          [on_device](Accumulator& self, const std::vector<std::int64_t>& indices, StreamArg stream) {
            const MaybeReleaseGil release(on_device(self));
            return self.lend_many(indices, stream.on());
          },
          py::arg("indices"), py::arg("stream"))
      .def(
          "seal", [](Accumulator& self, StreamArg stream, std::uintptr_t totals) { self.seal(stream.on(), totals); },
          py::arg("stream"), py::arg("totals") = 0, py::call_guard<py::gil_scoped_release>())
      .def("consume", on_stream(&Accumulator::consume), py::arg("stream"))
      .def("continue_on", on_stream(&Accumulator::continue_on), py::arg("stream"))
      .def("release", on_stream(&Accumulator::release), py::arg("stream"))
      .def_property_readonly("states", &Accumulator::states)
      .def_property_readonly("front", &Accumulator::front)
      .def_property_readonly("sum_of_squares", released(&Accumulator::sum_of_squares))
      .def_property_readonly("nonfinite_count", released(&Accumulator::nonfinite_count))
      .def_property_readonly("front_touched", &Accumulator::front_touched)
      .def_property_readonly("touched", &Accumulator::touched);
}

}  // namespace paci_rt
