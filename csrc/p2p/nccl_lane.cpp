#include "p2p/nccl_lane.hpp"

#include <sched.h>

#include <cstdio>

namespace paci_rt {
namespace {

constexpr std::size_t kWarmBytes = std::size_t{1} << 20;  // enough for every channel of a connection
constexpr double kFinishS = 5.0;                          // how long a communicator may take to end in peace

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

// --- a communicator ---

NcclCommunicator::NcclCommunicator(std::shared_ptr<NcclApi> api, const LaneOptions& options)
    : api_(std::move(api)), options_(options) {}

void NcclCommunicator::begin(int ranks, int rank, const NcclLaneOptions& options) {
  const std::shared_ptr<void> current = options_.ops->enter(options_.device);
  NcclComm made = nullptr;
  const NcclResult result = api_->comm_init(&made, ranks, options.id, rank, options.max_ctas);
  comm_ = made;
  if (result != NcclResult::in_progress) api_->check(result, "ncclCommInitRankConfig");
}

bool NcclCommunicator::connected() {
  const NcclComm comm = need();
  NcclResult state = NcclResult::success;
  api_->check(api_->comm_state(comm, &state), "ncclCommGetAsyncError", comm);
  if (state == NcclResult::in_progress) return false;
  api_->check(state, "ncclCommInitRankConfig", comm);
  return true;
}

NcclComm NcclCommunicator::need() const {
  const NcclComm comm = comm_;
  if (comm == nullptr) throw NcclError("this communicator was aborted, or was never made: make a new transport");
  return comm;
}

// NCCL puts back the device that it found, which makes a context on device 0 where the calling thread had none.
std::shared_ptr<void> NcclCommunicator::enter() const noexcept {
  try {
    return options_.ops->enter(options_.device);
  } catch (const std::exception& error) {  // the device has failed: what follows says so too
    std::fprintf(stderr, "paci_rt: %s\n", error.what());
    return nullptr;
  }
}

void NcclCommunicator::start(const Calls& calls) {
  const NcclComm comm = need();
  const std::shared_ptr<void> current = options_.ops->enter(options_.device);
  api_->check(api_->group_start(), "ncclGroupStart", comm);
  try {
    calls(*api_, comm);
  } catch (...) {
    (void)api_->group_end();  // the error that counts is on its way
    throw;
  }
  const NcclResult result = api_->group_end();
  if (result != NcclResult::in_progress) api_->check(result, "ncclGroupEnd", comm);
}

bool NcclCommunicator::settled() {
  const NcclComm comm = need();
  NcclResult state = NcclResult::success;
  api_->check(api_->comm_state(comm, &state), "ncclCommGetAsyncError", comm);
  if (state == NcclResult::in_progress) return false;
  api_->check(state, "ncclGroupEnd", comm);
  return true;
}

// Nothing may be put on the stream before the calls are really there.
void NcclCommunicator::issue(const Calls& calls) {
  start(calls);
  const std::int64_t end = now_ns() + static_cast<std::int64_t>(options_.timeout_s * 1e9);
  while (!settled()) {
    if (options_.stop->load()) throw NcclError("ncclGroupEnd was given up, since the transport failed elsewhere");
    if (now_ns() > end)
      throw NcclError(concat("ncclGroupEnd was still in progress after ", options_.timeout_s,
                             " s (transfer_timeout_s): NCCL_DEBUG=INFO says what it waits for"));
    sched_yield();
  }
}

bool NcclCommunicator::wait_settled(NcclComm comm, double seconds) noexcept {
  const std::int64_t end = now_ns() + static_cast<std::int64_t>(seconds * 1e9);
  NcclResult state = NcclResult::in_progress;
  while (now_ns() < end) {
    if (api_->comm_state(comm, &state) != NcclResult::success) return false;
    if (state != NcclResult::in_progress) return state == NcclResult::success;
    sched_yield();
  }
  return false;
}

std::string NcclCommunicator::trouble() {
  const NcclComm comm = comm_;
  if (comm == nullptr) return {};
  NcclResult state = NcclResult::success;
  const NcclResult asked = api_->comm_state(comm, &state);
  const NcclResult found = asked != NcclResult::success ? asked : state;
  if (found == NcclResult::success || found == NcclResult::in_progress) return {};
  const std::string last = api_->last_error(comm);
  return concat("NCCL reports ", api_->error_text(found), last.empty() ? "" : ": ", last);
}

void NcclCommunicator::abort() noexcept {
  const NcclComm comm = comm_.exchange(nullptr);
  if (comm == nullptr) return;
  const std::shared_ptr<void> current = enter();
  handles_.clear();  // they went with it
  const NcclResult result = api_->comm_abort(comm);
  if (result != NcclResult::success && result != NcclResult::in_progress)
    std::fprintf(stderr, "paci_rt: ncclCommAbort failed with %d\n", static_cast<int>(result));
}

void NcclCommunicator::finish() noexcept {
  const NcclComm comm = comm_;
  if (comm == nullptr) return;
  const std::shared_ptr<void> current = enter();
  for (const auto& [address, handle] : handles_) (void)api_->comm_deregister(comm, handle);
  handles_.clear();
  const NcclResult result = api_->comm_finalize(comm);
  finishing_ = result == NcclResult::success || result == NcclResult::in_progress;
}

void NcclCommunicator::close() noexcept {
  const NcclComm comm = comm_;
  if (comm == nullptr) return;
  if (!finishing_ || !wait_settled(comm, kFinishS)) return abort();
  const std::shared_ptr<void> current = enter();
  comm_ = nullptr;
  (void)api_->comm_destroy(comm);
}

void* NcclCommunicator::allocate_registered(std::int64_t bytes) {
  const NcclComm comm = need();
  const std::shared_ptr<void> current = options_.ops->enter(options_.device);
  void* address = nullptr;
  void* handle = nullptr;
  api_->check(api_->mem_alloc(&address, size(bytes)), "ncclMemAlloc", comm);
  const NcclResult result = api_->comm_register(comm, address, size(bytes), &handle);
  if (result != NcclResult::success) {
    (void)api_->mem_free(address);
    api_->check(result, "ncclCommRegister (register_buffers=False does without)", comm);
  }
  handles_[address] = handle;
  return address;
}

void NcclCommunicator::release_registered(void* address) noexcept {
  const NcclComm comm = comm_;
  const std::shared_ptr<void> current = enter();
  const auto found = handles_.find(address);
  if (found != handles_.end()) {
    if (comm != nullptr) (void)api_->comm_deregister(comm, found->second);
    handles_.erase(found);
  }
  (void)api_->mem_free(address);
}

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
