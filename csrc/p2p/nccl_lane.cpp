#include "p2p/nccl_lane.hpp"

#include "p2p/nccl_communicator.hpp"

namespace paci_rt {
namespace {

constexpr std::size_t kWarmBytes = std::size_t{1} << 20;  // enough for every channel of a connection

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }
std::size_t size(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

// Calls `call(address, bytes)` for every tensor that has bytes.
template <typename Call>
void for_each_tensor(const Transfer& transfer, const Call& call) {
  for (std::size_t i = 0; i < transfer.layout->tensors.size(); ++i) {
    const std::int64_t bytes = transfer.layout->tensors[i].bytes();
    if (bytes > 0) call(i, size(bytes));
  }
}

// Work that was recorded into CUDA graphs: the events stay, since a graph may be instantiated from its recording again.
class Captured {
 public:
  explicit Captured(const LaneOptions& options) : options_(options) {}
  // What follows on `lane` belongs to the graph that is being recorded on `from`.
  void fork(Stream from, Stream lane) {
    Event& event = events_.emplace_back(options_.ops, options_.device);
    event.record(from);
    event.block(lane);
  }
  void mark(Stream lane) { events_.emplace_back(options_.ops, options_.device).record(lane), open_ = true; }
  void join(Stream to) {
    if (open_) events_.back().block(to);
    open_ = false;
  }

 private:
  const LaneOptions options_;
  std::vector<Event> events_;
  bool open_ = false;
};

// What both directions have in common.
template <typename Base>
class NcclLane : public Base {
 public:
  NcclLane(std::shared_ptr<NcclApi> api, const LaneOptions& options, const NcclLaneOptions& nccl, int rank)
      : Base(options),
        comm_(std::move(api), options),
        nccl_(nccl),
        rank_(rank),
        captured_(options),
        memory_(
            options.slots, [this](std::int64_t bytes) { return allocate(bytes); },
            [this](void* address) { release(address); }) {}
  ~NcclLane() override {
    memory_.clear();
    if (scratch_ != nullptr) this->options_.ops->release(this->options_.device, scratch_);
  }

  std::string backend() const override { return "nccl"; }
  bool can_register() const override { return nccl_.register_buffers; }

  void begin(ControlLink&, bool registered) override {
    registered_ = registered;
    comm_.begin(2, rank_, nccl_);
  }
  bool connected() override { return comm_.connected(); }

  void warm_up() override {
    scratch_ = this->options_.ops->allocate(this->options_.device, kWarmBytes);
    comm_.start([this](NcclApi& api, NcclComm comm) { transfer(api, comm, scratch_, kWarmBytes); });
  }
  bool settled() override { return comm_.settled(); }

  std::string trouble() override { return comm_.trouble(); }
  void abort() noexcept override { comm_.abort(); }
  void finish() noexcept override { comm_.finish(); }
  void close() noexcept override { comm_.close(); }

 protected:
  virtual void transfer(NcclApi& api, NcclComm comm, void* buffer, std::size_t bytes) = 0;

  NcclCommunicator comm_;
  const NcclLaneOptions nccl_;
  const int rank_;
  bool registered_ = false;
  Captured captured_;
  SlotMemory memory_;

 private:
  void* allocate(std::int64_t bytes) {
    return registered_ ? comm_.allocate_registered(bytes)
                       : this->options_.ops->allocate(this->options_.device, size(bytes));
  }
  void release(void* address) noexcept {
    if (registered_)
      comm_.release_registered(address);
    else
      this->options_.ops->release(this->options_.device, address);
  }

  void* scratch_ = nullptr;
};

class NcclSender final : public NcclLane<SendLane> {
 public:
  NcclSender(std::shared_ptr<NcclApi> api, const LaneOptions& options, const NcclLaneOptions& nccl)
      : NcclLane(std::move(api), options, nccl, 0) {}

  void issue(const Transfer& message) override {
    if (message.layout->bytes == 0) return;
    if (!registered_) return send(message);
    memory_.ensure(message.slot, message.layout->bytes);
    char* staging = static_cast<char*>(memory_.address(message.slot));
    for_each_tensor(message, [&](std::size_t i, std::size_t bytes) {
      options_.ops->copy(stream(), staging + message.layout->offsets[i], pointer(message.addresses[i]), bytes);
    });
    comm_.issue([&](NcclApi& api, NcclComm comm) { transfer(api, comm, staging, size(message.layout->bytes)); });
  }

  void capture(const Transfer& message, Stream from) override {
    captured_.fork(from, stream());
    if (message.layout->bytes > 0) send(message);
    captured_.mark(stream());
  }
  void join_captured(Stream to) override { captured_.join(to); }

 private:
  void send(const Transfer& message) {
    comm_.issue([&](NcclApi& api, NcclComm comm) {
      for_each_tensor(message, [&](std::size_t i, std::size_t bytes) {
        transfer(api, comm, pointer(message.addresses[i]), bytes);
      });
    });
  }
  void transfer(NcclApi& api, NcclComm comm, void* buffer, std::size_t bytes) override {
    api.check(api.send(buffer, bytes, 1, comm, stream()), "ncclSend", comm);
  }
};

class NcclReceiver final : public NcclLane<RecvLane> {
 public:
  NcclReceiver(std::shared_ptr<NcclApi> api, const LaneOptions& options, const NcclLaneOptions& nccl)
      : NcclLane(std::move(api), options, nccl, 1) {
    for (std::int64_t i = 0; i < options.slots; ++i) {
      arrived_.emplace_back(options.ops, options.device);
      freed_.emplace_back(options.ops, options.device);
    }
  }

  void post(const Transfer& message) override {
    const auto slot = static_cast<std::size_t>(message.slot);
    freed_[slot].block(stream());
    if (message.layout->bytes > 0) {
      memory_.ensure(message.slot, message.layout->bytes);
      char* buffer = static_cast<char*>(memory_.address(message.slot));
      comm_.issue([&](NcclApi& api, NcclComm comm) {
        if (registered_) return transfer(api, comm, buffer, size(message.layout->bytes));
        for_each_tensor(message, [&](std::size_t i, std::size_t bytes) {
          transfer(api, comm, buffer + message.layout->offsets[i], bytes);
        });
      });
    }
    arrived_[slot].record(stream());
  }

  void capture(const Transfer& message, Stream from) override {
    captured_.fork(from, stream());
    if (message.layout->bytes > 0) {
      comm_.issue([&](NcclApi& api, NcclComm comm) {
        for_each_tensor(message, [&](std::size_t i, std::size_t bytes) {
          transfer(api, comm, pointer(message.addresses[i]), bytes);
        });
      });
    }
    captured_.mark(stream());
    captured_.join(from);
  }

  std::uintptr_t address(std::int64_t slot) const override {
    return reinterpret_cast<std::uintptr_t>(memory_.address(slot));
  }
  void wait_arrived(std::int64_t slot, Stream stream) override {
    arrived_[static_cast<std::size_t>(slot)].block(stream);
  }
  void free(std::int64_t slot, Stream stream) override { freed_[static_cast<std::size_t>(slot)].record(stream); }
  bool all_freed() override {
    return std::all_of(freed_.begin(), freed_.end(), [](const Event& event) { return event.done(); });
  }
  std::int64_t ring_bytes() const override { return memory_.total(); }

 private:
  void transfer(NcclApi& api, NcclComm comm, void* buffer, std::size_t bytes) override {
    api.check(api.recv(buffer, bytes, 0, comm, stream()), "ncclRecv", comm);
  }

  std::vector<Event> arrived_, freed_;
};

class NcclMover final : public Mover {
 public:
  NcclMover(std::shared_ptr<NcclApi> api, const LaneOptions& options, const NcclLaneOptions& nccl)
      : comm_(std::move(api), options), nccl_(nccl) {}
  std::string name() const override { return "nccl"; }
  void begin() override { comm_.begin(1, 0, nccl_); }
  bool connected() override { return comm_.connected(); }
  void move(Stream stream, const Transfer& message, void* slot) override {
    comm_.issue([&](NcclApi& api, NcclComm comm) {
      for_each_tensor(message, [&](std::size_t i, std::size_t bytes) {
        api.check(api.send(pointer(message.addresses[i]), bytes, 0, comm, stream), "ncclSend", comm);
        api.check(api.recv(static_cast<char*>(slot) + message.layout->offsets[i], bytes, 0, comm, stream), "ncclRecv",
                  comm);
      });
    });
  }
  std::string trouble() override { return comm_.trouble(); }
  void abort() noexcept override { comm_.abort(); }
  void finish() noexcept override { comm_.finish(); }
  void close() noexcept override { comm_.close(); }

 private:
  NcclCommunicator comm_;
  const NcclLaneOptions nccl_;
};

}  // namespace

std::unique_ptr<Mover> make_nccl_mover(std::shared_ptr<NcclApi> api, const LaneOptions& options,
                                       const NcclLaneOptions& nccl) {
  return std::make_unique<NcclMover>(std::move(api), options, nccl);
}

std::unique_ptr<SendLane> make_nccl_sender(std::shared_ptr<NcclApi> api, const LaneOptions& options,
                                           const NcclLaneOptions& nccl) {
  return std::make_unique<NcclSender>(std::move(api), options, nccl);
}

std::unique_ptr<RecvLane> make_nccl_receiver(std::shared_ptr<NcclApi> api, const LaneOptions& options,
                                             const NcclLaneOptions& nccl) {
  return std::make_unique<NcclReceiver>(std::move(api), options, nccl);
}

}  // namespace paci_rt
