#include "p2p/device_engine.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "bindings/memory.hpp"
#include "bindings/message.hpp"
#include "bindings/module.hpp"
#include "p2p/ipc_lane.hpp"
#include "p2p/nccl_lane.hpp"

namespace py = pybind11;

namespace paci_rt {
namespace {

using Engine = std::shared_ptr<DeviceEngine>;
using Nccl = std::shared_ptr<NcclApi>;
using Released = py::call_guard<py::gil_scoped_release>;

// Threads are joined when the last reference goes, which may be that of a lease.
Engine make_engine(int device, int stage, std::int64_t slots, double timeout_s, std::shared_ptr<DeviceOps> ops) {
  if (!ops) ops = device_ops_for(device);
  const py::gil_scoped_release release;
  return {new DeviceEngine(std::move(ops), device, stage, Options{slots, timeout_s, check_signals}),
          &delete_without_gil<DeviceEngine>};
}

NcclUniqueId id_of(const py::bytes& bytes) {
  const std::string text = bytes;
  check_value(text.size() == NcclUniqueId::kBytes, "a unique id of ", text.size(),
              " bytes is not one of NCCL's, which has ", NcclUniqueId::kBytes);
  NcclUniqueId id;
  text.copy(id.internal, sizeof id.internal);
  return id;
}

// How one end of a channel is to move its bytes, as Python says it.
struct Wanted {
  std::string backend;
  Nccl nccl;
  NcclLaneOptions options;

  Nccl need_nccl() const {
    check_value(nccl != nullptr, "backend ", backend, " without a library: pass nccl=load_nccl(...)");
    return nccl;
  }
  void need_ipc() const {  // the last one to be asked for
    check_value(backend == "ipc", "unknown backend ", backend, ": choose from nccl, ipc, self-nccl, self-copy");
  }
};

std::unique_ptr<SendLane> sender_of(const Wanted& wanted, const LaneOptions& lane) {
  if (wanted.backend == "nccl") return make_nccl_sender(wanted.need_nccl(), lane, wanted.options);
  if (wanted.backend == "self-nccl")
    return make_push_sender(lane, Reach::process, make_nccl_mover(wanted.need_nccl(), lane, wanted.options));
  if (wanted.backend == "self-copy") return make_push_sender(lane, Reach::process, make_copy_mover(lane.ops));
  wanted.need_ipc();
  return make_push_sender(lane, Reach::host, make_copy_mover(lane.ops));
}

std::unique_ptr<RecvLane> receiver_of(const Wanted& wanted, const LaneOptions& lane) {
  if (wanted.backend == "nccl") return make_nccl_receiver(wanted.need_nccl(), lane, wanted.options);
  if (wanted.backend == "self-nccl") return make_push_receiver(lane, Reach::process, "nccl");
  if (wanted.backend == "self-copy") return make_push_receiver(lane, Reach::process, "copy");
  wanted.need_ipc();
  return make_push_receiver(lane, Reach::host, "copy");
}

// A message that lies in a slot until it is unpacked, or forgotten.
struct Taken {
  Arrival arrival;
  std::shared_ptr<DeviceOps> ops;
  Stream stream;
  std::shared_ptr<std::mutex> mutex = std::make_shared<std::mutex>();

  void unpack(const std::vector<Memory>& tensors) {
    const std::vector<TensorMeta>& metas = arrival.layout->tensors;
    const std::vector<std::uintptr_t> addresses = addresses_for(*arrival.layout, tensors);
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(*mutex);
    check_value(arrival.lease != nullptr, "this message has been unpacked already");
    for (std::size_t i = 0; i < metas.size(); ++i) {
      const auto bytes = static_cast<std::size_t>(metas[i].bytes());
      const void* from = reinterpret_cast<const char*>(arrival.address) + arrival.layout->offsets[i];
      if (bytes > 0) ops->copy(stream, reinterpret_cast<void*>(addresses[i]), from, bytes);
    }
    arrival.lease = nullptr;
  }
};

void bind_nccl(py::module_& m) {
  py::class_<NcclApi, Nccl>(m, "Nccl")
      .def_property_readonly("path", method<NcclApi>(&NcclApi::path))
      .def_property_readonly("version", method<NcclApi>(&NcclApi::version))
      .def_property_readonly("version_text", [](const NcclApi& self) { return nccl_version_text(self.version()); })
      .def_property_readonly("features",
                             [](const NcclApi& self) {
                               const NcclFeatures has = self.features();
                               py::dict found;
                               found["split_share"] = has.split_share;
                               found["mem_alloc"] = has.mem_alloc;
                               found["registered_p2p"] = has.registered_p2p;
                               found["launch_order"] = has.launch_order;
                               found["multi_rank_gpu"] = has.multi_rank_gpu;
                               return found;
                             })
      .def("unique_id",
           [](NcclApi& self) {
             NcclUniqueId id;
             {
               const py::gil_scoped_release release;
               self.check(self.unique_id(&id), "ncclGetUniqueId");
             }
             return py::bytes(id.internal, sizeof id.internal);
           })
      // A communicator of this process alone on the current device, made and ended: whether NCCL works at all.
      .def(
          "try_communicator",
          [](NcclApi& self) {
            NcclUniqueId id;
            self.check(self.unique_id(&id), "ncclGetUniqueId");
            NcclComm comm = nullptr;
            NcclResult state = self.comm_init(&comm, 1, id, 0, 0);
            if (state != NcclResult::in_progress) self.check(state, "ncclCommInitRankConfig");
            while (self.comm_state(comm, &state) == NcclResult::success && state == NcclResult::in_progress)
              std::this_thread::yield();
            self.check(state, "ncclCommInitRankConfig", comm);
            (void)self.comm_abort(comm);
          },
          Released());
  m.def("load_nccl", &load_nccl, py::arg("name"), py::arg("candidates"), Released());
  m.attr("oldest_nccl") = nccl_version_text(kOldestNccl);
}

void bind_ends(py::module_& m) {
  py::class_<DeviceOutgoing, Outgoing, std::shared_ptr<DeviceOutgoing>>(m, "DeviceOutgoing")
      .def(
          "capture",
          [](DeviceOutgoing& self, std::int64_t index, const py::object& packed, const std::vector<Memory>& tensors,
             int device, StreamArg stream) {
            auto layout = layout_for(packed, self.layout(), self.edge());
            const auto addresses = addresses_for(*layout, tensors);
            const py::gil_scoped_release release;
            self.capture(index, std::move(layout), addresses, stream.on(device));
          },
          py::arg("index"), py::arg("packed"), py::arg("tensors"), py::arg("device"), py::arg("stream"))
      .def(
          "send_on",
          [](DeviceOutgoing& self, std::int64_t index, const py::object& packed, const std::vector<Memory>& tensors,
             int device, StreamArg stream) {
            auto layout = layout_for(packed, self.layout(), self.edge());
            const auto addresses = addresses_for(*layout, tensors);
            const py::gil_scoped_release release;
            return self.send(index, std::move(layout), addresses, stream.on(device));
          },
          py::arg("index"), py::arg("packed"), py::arg("tensors"), py::arg("device"), py::arg("stream"))
      // The engine's threads ask the device with the engine locked.
      .def("completed", method<DeviceOutgoing>(&DeviceOutgoing::completed), Released())
      .def(
          "join_captured",
          [](DeviceOutgoing& self, int device, StreamArg stream) { self.join_captured(stream.on(device)); },
          py::arg("device"), py::arg("stream"), Released());
  py::class_<Taken>(m, "DeviceMessage")
      .def_property_readonly("sequence", [](const Taken& self) { return self.arrival.sequence; })
      .def_property_readonly("slot", [](const Taken& self) { return self.arrival.slot; })
      .def_property_readonly("packed", [](const Taken& self) { return py::bytes(self.arrival.layout->packed); })
      .def("unpack", method<Taken>(&Taken::unpack), py::arg("tensors"));
  py::class_<DeviceIncoming, Incoming, std::shared_ptr<DeviceIncoming>>(m, "DeviceIncoming")
      .def(
          "take",
          [](const std::shared_ptr<DeviceIncoming>& self, std::int64_t index, int device, StreamArg stream) {
            check_value(self != nullptr, "None is no DeviceIncoming");
            const py::gil_scoped_release release;
            return Taken{self->take(index, stream.on(device)), self->ops(), stream.on(device)};
          },
          py::arg("index"), py::arg("device"), py::arg("stream"))
      .def(
          "capture",
          [](DeviceIncoming& self, std::int64_t index, const std::vector<Memory>& tensors, int device,
             StreamArg stream) {
            auto layout = layout_for(py::none(), self.layout(), self.edge());
            const auto addresses = addresses_for(*layout, tensors);
            const py::gil_scoped_release release;
            self.capture(index, std::move(layout), addresses, stream.on(device));
          },
          py::arg("index"), py::arg("tensors"), py::arg("device"), py::arg("stream"))
      .def_property_readonly("packed",
                             [](const DeviceIncoming& self) -> py::object {
                               const auto layout = self.layout();
                               if (layout == nullptr) return py::none();
                               return py::bytes(layout->packed);
                             })
      .def("ready", method<DeviceIncoming>(&DeviceIncoming::ready), Released())
      .def_property_readonly("ring_bytes", method<DeviceIncoming>(&DeviceIncoming::ring_bytes));
}

using EngineClass = py::class_<DeviceEngine, Engine>;

// Binds `DeviceEngine.name`: adds one end of a channel, with the lane that `lane_of` makes.
template <typename LaneOf>
void bind_add(EngineClass& engine, const char* name, const LaneOf& lane_of) {
  engine.def(
      name,
      [lane_of](const Engine& self, const std::string& kind, int sender, int receiver, int fd, std::string backend,
                Nccl nccl, const py::bytes& unique_id, int max_ctas, bool register_buffers, int priority) {
        check_value(self != nullptr, "None is no DeviceEngine");
        Wanted wanted{std::move(backend), std::move(nccl), {}};
        if (wanted.backend == "nccl" || wanted.backend == "self-nccl") wanted.options.id = id_of(unique_id);
        wanted.options.max_ctas = max_ctas;
        wanted.options.register_buffers = register_buffers;
        const py::gil_scoped_release release;
        auto link = std::make_unique<ControlLink>(fd);
        auto& end =
            self->add(Edge{kind, sender, receiver}, std::move(link), lane_of(wanted, self->lane_options(priority)));
        return std::shared_ptr<std::remove_reference_t<decltype(end)>>(self, &end);
      },
      py::kw_only(), py::arg("kind"), py::arg("sender"), py::arg("receiver"), py::arg("fd"), py::arg("backend"),
      py::arg("nccl") = nullptr, py::arg("unique_id") = py::bytes(), py::arg("max_ctas") = 4,
      py::arg("register_buffers") = false, py::arg("priority") = 0);
}

void bind_engine(py::module_& m) {
  EngineClass engine(m, "DeviceEngine");
  engine.def(py::init(&make_engine), py::arg("device"), py::arg("stage"), py::arg("slots"), py::arg("timeout_s"),
             py::arg("ops") = nullptr);
  bind_add(engine, "add_outgoing", sender_of);
  bind_add(engine, "add_incoming", receiver_of);
  engine.def("connect", method<DeviceEngine>(&DeviceEngine::connect), Released())
      .def("check", method<DeviceEngine>(&DeviceEngine::check), Released())
      .def("fail", method<DeviceEngine>(&DeviceEngine::give_up), py::arg("origin"), Released())
      .def("close", method<DeviceEngine>(&DeviceEngine::close), Released())
      .def_property_readonly("failed", method<DeviceEngine>(&DeviceEngine::failed))
      .def_property_readonly("multiprocessors", method<DeviceEngine>(&DeviceEngine::multiprocessors))
      .def("json", method<DeviceEngine>(&DeviceEngine::json), Released());
}

}  // namespace

void bind_device_engine(py::module_& m) {
  bind_nccl(m);
  bind_ends(m);
  bind_engine(m);
}

}  // namespace paci_rt
