#include "buffers/accumulator.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/memory.hpp"
#include "bindings/module.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

constexpr const char* kWho = "this accumulator";

using Pairs = std::vector<std::pair<std::int64_t, std::int64_t>>;

std::vector<Segment> segments_of(const Pairs& pairs) {
  std::vector<Segment> segments;
  segments.reserve(pairs.size());
  for (const auto& [offset, numel] : pairs) segments.push_back({offset, numel});
  return segments;
}

Accumulator make(const Pairs& segments, std::int64_t numel, const std::vector<Memory>& buffers, int device,
                 std::shared_ptr<StreamOps> ops) {
  if (!ops) ops = ops_for(device);
  std::vector<std::uintptr_t> addresses;
  std::vector<std::shared_ptr<void>> kept;
  for (const Memory& buffer : buffers) {
    addresses.push_back(ops ? buffer.holding(numel, 4, "a buffer") : buffer.host(numel, 4, "a buffer"));
    kept.push_back(pinned(buffer));
  }
  Accumulator made(segments_of(segments), numel, addresses, device, std::move(ops));
  made.keep(std::move(kept));
  return made;
}

void seal(Accumulator& self, StreamArg stream, const Memory& totals) {
  check_value(totals.address == 0 || !self.on_cpu(), "totals was passed for sums on the CPU, which are counted there");
  if (totals.owner) (void)totals.holding(2, 8, "totals");
  const std::shared_ptr<void> keep = totals.owner ? kept_alive(totals.owner) : nullptr;
  const py::gil_scoped_release release;
  const Sole sole(self.users(), kWho);
  self.seal(stream.on(), totals.address, keep);
}

}  // namespace

void bind_accumulator(py::module_& m) {
  // A device may make the caller wait, for room in a stream's queue; on the CPU only `add` and `seal` take time.
  const auto on_device = [](const Accumulator& self) { return !self.on_cpu(); };
  const auto on_stream = [on_device](auto method) {
    return [on_device, method](Accumulator& self, StreamArg stream) {
      const MaybeReleaseGil release(on_device(self));
      const Sole sole(self.users(), kWho);
      return (self.*method)(stream.on());
    };
  };
  const auto alone = [](auto getter) {
    return py::cpp_function(
        [getter](const Accumulator& self) {
          const Sole sole(self.users(), kWho);
          return (self.*getter)();
        },
        py::call_guard<py::gil_scoped_release>());
  };
  py::class_<Accumulator>(m, "Accumulator")
      .def(py::init(&make), py::arg("segments"), py::arg("numel"), py::arg("buffers"), py::arg("device") = kCpu,
           py::arg("ops") = nullptr)
      .def(
          "add",
          [](Accumulator& self, std::int64_t index, const Memory& grad, int dtype, std::int64_t numel, StreamArg stream,
             int threads) {
            const DType type = dtype_of(dtype);
            const std::uintptr_t address = grad.host(numel, size_of(type), "the gradient");
            const MaybeReleaseGil release(numel);
            const Sole sole(self.users(), kWho);
            self.add(index, address, type, numel, stream.on(), threads);
          },
          py::arg("index"), py::arg("grad"), py::arg("dtype"), py::arg("numel"), py::arg("stream"), py::arg("threads"))
      .def(
          "lend",
          [on_device](Accumulator& self, std::int64_t index, StreamArg stream, int threads) {
            const MaybeReleaseGil release(on_device(self));
            const Sole sole(self.users(), kWho);
            return self.lend(index, stream.on(), threads);
          },
          py::arg("index"), py::arg("stream"), py::arg("threads"))
      .def(
          "lend_many",
          [on_device](Accumulator& self, const std::vector<std::int64_t>& indices, StreamArg stream) {
            const MaybeReleaseGil release(on_device(self));
            const Sole sole(self.users(), kWho);
            return self.lend_many(indices, stream.on());
          },
          py::arg("indices"), py::arg("stream"))
      .def("seal", &seal, py::arg("stream"), py::arg("totals") = py::none())
      .def("consume", on_stream(&Accumulator::consume), py::arg("stream"))
      .def("continue_on", on_stream(&Accumulator::continue_on), py::arg("stream"))
      .def("release", on_stream(&Accumulator::release), py::arg("stream"))
      .def_property_readonly("states", alone(&Accumulator::states))
      .def_property_readonly("front", [](const Accumulator& self) { return self.front(); })
      .def_property_readonly("sum_of_squares", alone(&Accumulator::sum_of_squares))
      .def_property_readonly("nonfinite_count", alone(&Accumulator::nonfinite_count))
      .def_property_readonly("front_touched", alone(&Accumulator::front_touched))
      .def_property_readonly("touched", alone(&Accumulator::touched));
}

}  // namespace paci_rt
