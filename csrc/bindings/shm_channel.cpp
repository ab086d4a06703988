#include "p2p/shm_channel.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/dlpack.hpp"
#include "bindings/memory.hpp"
#include "bindings/message.hpp"
#include "bindings/module.hpp"
#include "p2p/channel.hpp"
#include "p2p/copier.hpp"
#include "p2p/shm_segment.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

using Released = py::call_guard<py::gil_scoped_release>;

constexpr const char* kCapsule = "dltensor";  // the consumer of the tensor renames it

py::object capsule(const Arrival& arrival, std::size_t at, int device) {
  DLManagedTensor* tensor = to_dlpack(arrival, at, device);
  PyObject* made = PyCapsule_New(tensor, kCapsule, [](PyObject* self) {
    if (PyCapsule_IsValid(self, kCapsule) == 0) return;
    auto* left = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, kCapsule));
    left->deleter(left);
  });
  if (made == nullptr) {
    tensor->deleter(tensor);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(made);
}

// The tensors as DLPack capsules, None for absent ones; and which of them want a gradient.
std::pair<py::tuple, py::tuple> receive(Incoming& self, std::int64_t index, StreamArg stream) {
  Arrival arrival;
  {
    const py::gil_scoped_release release;
    const Sole sole(self.users(), "this end of a channel");
    arrival = self.take(index, stream.on());
  }
  const std::vector<TensorMeta>& metas = arrival.layout->tensors;
  py::tuple tensors(metas.size()), wanted(metas.size());
  for (std::size_t at = 0; at < metas.size(); ++at) {
    tensors[at] = metas[at].present ? capsule(arrival, at, kCpu) : py::none();
    wanted[at] = py::bool_(metas[at].requires_grad);
  }
  return {std::move(tensors), std::move(wanted)};
}

std::int64_t send(Outgoing& self, std::int64_t index, const py::object& packed, const std::vector<Memory>& tensors,
                  StreamArg stream) {
  auto layout = layout_for(packed, self.layout(), self.edge());
  const auto addresses = addresses_for(*layout, tensors);
  const py::gil_scoped_release release;
  const Sole sole(self.users(), "this end of a channel");
  return self.send(index, std::move(layout), addresses, stream.on());
}

void bind_endpoints(py::module_& m) {
  py::class_<Endpoint, std::shared_ptr<Endpoint>>(m, "Endpoint")
      .def_property_readonly("edge", [](const Endpoint& self) { return self.edge().name(); })
      .def_property_readonly("slots", method<Endpoint>(&Endpoint::slots))
      .def_property_readonly("timeout_s", method<Endpoint>(&Endpoint::timeout_s))
      .def_property_readonly("progress",
                             [](const Endpoint& self) {
                               const Progress at = self.progress();
                               return std::make_pair(at.sent, at.taken);
                             })
      .def("json", method<Endpoint>(&Endpoint::json))
      .def("close", method<Endpoint>(&Endpoint::close), Released());
  py::class_<Outgoing, Endpoint, std::shared_ptr<Outgoing>>(m, "Outgoing")
      .def("send", &send, py::arg("index"), py::arg("packed"), py::arg("tensors"), py::arg("stream") = 0)
      .def("has_room", method<Outgoing>(&Outgoing::has_room))
      .def("completed", method<Outgoing>(&Outgoing::completed))
      .def("flush", method<Outgoing>(&Outgoing::flush), Released());
  py::class_<Incoming, Endpoint, std::shared_ptr<Incoming>>(m, "Incoming")
      .def("post", method<Incoming>(&Incoming::post), Released())
      .def("ready", method<Incoming>(&Incoming::ready))
      .def("receive", &receive, py::arg("index"), py::arg("stream") = 0)
      .def_property_readonly("held", method<Incoming>(&Incoming::held));
}

void bind_shm(py::module_& m) {
  py::class_<ShmSegment, std::shared_ptr<ShmSegment>>(m, "ShmSegment")
      .def_static("create", &ShmSegment::create, py::arg("reserve_bytes") = ShmSegment::kReserveBytes)
      .def_static("attach", &ShmSegment::attach, py::arg("pid"), py::arg("fd"), py::arg("token"))
      .def_property_readonly("pid", method<ShmSegment>(&ShmSegment::pid))
      .def_property_readonly("fd", method<ShmSegment>(&ShmSegment::fd))
      .def_property_readonly("token", method<ShmSegment>(&ShmSegment::token))
      .def_property_readonly("allocated_bytes", method<ShmSegment>(&ShmSegment::allocated_bytes))
      .def("fail", method<ShmSegment>(&ShmSegment::fail), py::arg("reason"))
      .def("close", method<ShmSegment>(&ShmSegment::close))
      .def("lost", method<ShmSegment>(&ShmSegment::lost), py::arg("who"), py::arg("look") = true);
  py::class_<Copier, std::shared_ptr<Copier>>(m, "Copier")
      .def(py::init<std::int64_t>(), py::arg("from_bytes") = Copier::kFromBytes)
      .def("wait", method<Copier>(&Copier::wait), Released());
  py::class_<ShmOutgoing, Outgoing, std::shared_ptr<ShmOutgoing>>(m, "ShmOutgoing")
      .def(py::init([](const std::string& kind, int sender, int receiver, std::shared_ptr<ShmSegment> own,
                       std::shared_ptr<ShmSegment> peer, std::int64_t slots, std::int64_t held, double timeout_s,
                       std::shared_ptr<Copier> copier) {
             return std::make_shared<ShmOutgoing>(Edge{kind, sender, receiver},
                                                  Options{slots, timeout_s, check_signals}, std::move(own),
                                                  std::move(peer), held, std::move(copier));
           }),
           py::arg("kind"), py::arg("sender"), py::arg("receiver"), py::arg("own").none(false),
           py::arg("peer").none(false), py::arg("slots"), py::arg("held"), py::arg("timeout_s"),
           py::arg("copier") = nullptr)
      .def("wake", method<ShmOutgoing>(&ShmOutgoing::wake));
  py::class_<ShmIncoming, Incoming, std::shared_ptr<ShmIncoming>>(m, "ShmIncoming")
      .def(py::init([](const std::string& kind, int sender, int receiver, std::shared_ptr<ShmSegment> peer,
                       std::int64_t slots, double timeout_s) {
             return std::make_shared<ShmIncoming>(Edge{kind, sender, receiver},
                                                  Options{slots, timeout_s, check_signals}, std::move(peer));
           }),
           py::arg("kind"), py::arg("sender"), py::arg("receiver"), py::arg("peer").none(false), py::arg("slots"),
           py::arg("timeout_s"))
      .def("wake", method<ShmIncoming>(&ShmIncoming::wake));
  m.def("shm_memory_limit", [] {
    const MemoryLimit limit = memory_limit();
    return std::make_pair(limit.bytes, limit.name);
  });
}

}  // namespace

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_shm_channel(py::module_& m) {
  bind_endpoints(m);
  bind_shm(m);
  // For the test that both sides number dtypes alike.
  py::list names;
  for (int code = 0; code < kDTypeCount; ++code) names.append(dtype_info(code).name);
  m.attr("wire_dtypes") = py::tuple(names);
}

}  // namespace paci_rt
