#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "p2p.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

using Released = py::call_guard<py::gil_scoped_release>;

void bind_endpoints(py::module_& m) {
  py::class_<Endpoint, std::shared_ptr<Endpoint>>(m, "Endpoint")
      .def_property_readonly("edge", [](const Endpoint& self) { return self.edge().name(); })
      .def_property_readonly("slots", &Endpoint::slots)
      .def_property_readonly("timeout_s", &Endpoint::timeout_s)
      .def_property_readonly("progress",
                             [](const Endpoint& self) {
                               const Progress at = self.progress();
                               return std::make_pair(at.sent, at.taken);
                             })
      .def("json", &Endpoint::json)
      .def("close", &Endpoint::close, Released());
  py::class_<Outgoing, Endpoint, std::shared_ptr<Outgoing>>(m, "Outgoing")
      .def(
          "send",
          [](Outgoing& self, std::int64_t index, const py::object& packed, const std::vector<std::uintptr_t>& addresses,
             StreamArg stream) {
            // None: described as the last message.
            auto layout = packed.is_none() ? self.layout() : Layout::parse(packed.cast<std::string>());
            check_value(layout != nullptr, "the first message of a channel needs its description");
            const py::gil_scoped_release release;
            return self.send(index, std::move(layout), addresses, stream.on());
          },
          py::arg("index"), py::arg("packed"), py::arg("addresses"), py::arg("stream") = 0)
      .def("has_room", &Outgoing::has_room)
      .def("completed", &Outgoing::completed)
      .def("flush", &Outgoing::flush, Released());
  py::class_<Incoming, Endpoint, std::shared_ptr<Incoming>>(m, "Incoming")
      .def("post", &Incoming::post, Released())
      .def("ready", &Incoming::ready)
      .def_property_readonly("held", &Incoming::held);
}

}  // namespace

// Called every so often by a wait that has given the interpreter lock away: a Ctrl-C ends it.
void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_p2p(py::module_& m) { bind_endpoints(m); }

}  // namespace paci_rt
