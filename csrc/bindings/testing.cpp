// The host twin and the fake NCCL: in the module only where PACI_RT_TESTING is on.
#include <pybind11/pybind11.h>

#include "bindings/module.hpp"
#include "testing/fake_nccl.hpp"
#include "testing/host_twin.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

using Released = py::call_guard<py::gil_scoped_release>;

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

void bind_host_twin(py::module_& testing) {
  py::class_<HostTwin, DeviceOps, std::shared_ptr<HostTwin>>(testing, "HostTwin")
      .def(py::init(&make), py::arg("max_delay_us") = 0, py::arg("seed") = 0)
      .def(
          "launch",
          [](HostTwin& self, int device, StreamArg stream, py::function work) {
            std::function<void()> held = work_of(std::move(work));
            const py::gil_scoped_release release;
            self.launch(stream.on(device), std::move(held));
          },
          py::arg("device"), py::arg("stream"), py::arg("work"))
      .def("lose_waits", method<HostTwin>(&HostTwin::lose_waits), py::arg("every"))
      .def(
          "capture", [](HostTwin& self, int device, StreamArg stream, bool on) { self.capture(stream.on(device), on); },
          py::arg("device"), py::arg("stream"), py::arg("on"))
      .def_property_readonly("allocated", method<HostTwin>(&HostTwin::allocated))
      .def_property_readonly("misuse", method<HostTwin>(&HostTwin::misuse))
      .def_property_readonly("waits", method<HostTwin>(&HostTwin::waits))
      .def_property_readonly("records", method<HostTwin>(&HostTwin::records));
}

void bind_fake_nccl(py::module_& testing) {
  py::class_<FakeNccl, NcclApi, std::shared_ptr<FakeNccl>>(testing, "FakeNccl")
      .def(py::init([](std::shared_ptr<HostTwin> twin, int version) {
             return std::make_shared<FakeNccl>(std::move(twin), version);
           }),
           py::arg("twin").none(false), py::arg("version") = 23203)
      .def("hold", method<FakeNccl>(&FakeNccl::hold), py::arg("on"), Released())
      .def("break_all", method<FakeNccl>(&FakeNccl::break_all), py::arg("result"))
      .def("set_init_result", method<FakeNccl>(&FakeNccl::set_init_result), py::arg("result"))
      .def("set_eager_bytes", method<FakeNccl>(&FakeNccl::set_eager_bytes), py::arg("bytes"))
      .def("set_background", method<FakeNccl>(&FakeNccl::set_background), py::arg("polls"))
      .def_property_readonly("matched", method<FakeNccl>(&FakeNccl::matched))
      .def_property_readonly("registered", method<FakeNccl>(&FakeNccl::registered))
      .def_property_readonly("alive", method<FakeNccl>(&FakeNccl::alive))
      .def_property_readonly("aborts", method<FakeNccl>(&FakeNccl::aborts))
      .def_property_readonly("misuse", method<FakeNccl>(&FakeNccl::misuse))
      .def_property_readonly("issuing_threads", method<FakeNccl>(&FakeNccl::issuing_threads));
}

}  // namespace

void bind_testing(py::module_& m) {
  py::module_ testing = m.def_submodule("_testing", "For the tests of paci_rt only.");
  bind_host_twin(testing);
  bind_fake_nccl(testing);
}

}  // namespace paci_rt
