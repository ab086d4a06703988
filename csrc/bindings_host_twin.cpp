#include <pybind11/pybind11.h>

#include "bindings.hpp"
#include "host_twin.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

// A Python callable that a worker thread may run and drop, each with the interpreter lock.
std::function<void()> work_of(py::function function) {
  const auto release = [](py::function* held) {
    const py::gil_scoped_acquire gil;
    delete held;
  };
  const std::shared_ptr<py::function> held(new py::function(std::move(function)), release);
  return [held] {
    const py::gil_scoped_acquire gil;
    try {
      (*held)();
    } catch (py::error_already_set& error) {
      throw std::runtime_error(error.what());  // a Python exception must not outlive the lock
    }
  };
}

// Workers may need the interpreter lock to finish, and the last reference goes while Python holds it.
std::shared_ptr<HostTwin> make(std::int64_t max_delay_us, std::uint64_t seed) {
  return {new HostTwin(max_delay_us, seed), &delete_without_gil<HostTwin>};
}

}  // namespace

void bind_host_twin(py::module_& m) {
  py::module_ testing = m.def_submodule("_testing", "For the tests of paci_rt only.");
  py::class_<HostTwin, StreamOps, std::shared_ptr<HostTwin>>(testing, "HostTwin")
      .def(py::init(&make), py::arg("max_delay_us") = 0, py::arg("seed") = 0)
      .def(
          "launch",
          [](HostTwin& self, int device, StreamArg stream, py::function work) {
            std::function<void()> held = work_of(std::move(work));
            const py::gil_scoped_release release;
            self.launch(stream.on(device), std::move(held));
          },
          py::arg("device"), py::arg("stream"), py::arg("work"))
      .def("lose_waits", &HostTwin::lose_waits, py::arg("every"))
      .def(
          "capture", [](HostTwin& self, int device, StreamArg stream, bool on) { self.capture(stream.on(device), on); },
          py::arg("device"), py::arg("stream"), py::arg("on"))
      .def_property_readonly("allocated", &HostTwin::allocated)
      .def_property_readonly("misuse", &HostTwin::misuse)
      .def_property_readonly("waits", &HostTwin::waits)
      .def_property_readonly("records", &HostTwin::records);
}

}  // namespace paci_rt
