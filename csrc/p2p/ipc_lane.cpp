#include "p2p/ipc_lane.hpp"

#include <algorithm>
#include <cstring>

namespace paci_rt {
namespace {

class CopyMover final : public Mover {
 public:
  explicit CopyMover(std::shared_ptr<DeviceOps> ops) : ops_(std::move(ops)) {}
  std::string name() const override { return "copy"; }
  void move(Stream stream, const Transfer& transfer, void* slot) override {
    for (std::size_t i = 0; i < transfer.addresses.size(); ++i)
      ops_->copy(stream, static_cast<char*>(slot) + transfer.layout->offsets[i],
                 reinterpret_cast<const void*>(transfer.addresses[i]),
                 static_cast<std::size_t>(transfer.layout->tensors[i].bytes()));
  }

 private:
  const std::shared_ptr<DeviceOps> ops_;
};

std::string backend_of(Reach reach, const std::string& mover) {
  return reach == Reach::host ? "ipc" : "in-process " + mover;
}

[[noreturn]] void refuse_capture(const std::string& backend) {
  throw OrderError(concat("a CUDA graph cannot hold transfers of the ", backend, " backend, whose events other ",
                          "processes record: use transport nccl for graphs"));
}

template <typename Value>
std::string raw(Value value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

template <typename Value>
Value from_raw(const std::string& text) {
  Value value{};
  check_value(text.size() == sizeof value, "a handle of ", text.size(), " bytes is not an address");
  std::memcpy(&value, text.data(), sizeof value);
  return value;
}

// Handles travel as a number of bytes and the bytes.
void put(std::string& to, const std::string& handle) {
  to += raw(static_cast<std::uint32_t>(handle.size()));
  to += handle;
}

std::string get(const std::string& from, std::size_t& at) {
  check_value(at + 4 <= from.size(), "a list of handles ends too early");
  const auto size = from_raw<std::uint32_t>(from.substr(at, 4));
  check_value(at + 4 + size <= from.size(), "a list of handles ends too early");
  at += 4 + size;
  return from.substr(at - size, size);
}

// CUDA takes smaller pieces of memory out of blocks of this size, and a handle shares the whole block, with whatever
// else of this process lies in it (CUDA C++ Programming Guide, "Interprocess Communication").
constexpr std::int64_t kSharedGranule = std::int64_t{2} << 20;

// The events that one side records and the other waits for, one a slot.
class Signals {
 public:
  Signals(const LaneOptions& options, Reach reach) : options_(options), reach_(reach) {}
  ~Signals() { clear(); }

  void make() {
    for (std::int64_t i = 0; i < options_.slots; ++i)
      events_.push_back(reach_ == Reach::host ? ops().make_shared_event(options_.device)
                                              : ops().make_event(options_.device));
    owned_ = true;
  }
  std::string exported() const {
    std::string text;
    for (const std::uintptr_t event : events_)
      put(text, reach_ == Reach::host ? ops().export_event(options_.device, event) : raw(event));
    return text;
  }
  void open(const std::string& text) {
    std::size_t at = 0;
    for (std::int64_t i = 0; i < options_.slots; ++i) {
      const std::string handle = get(text, at);
      events_.push_back(reach_ == Reach::host ? ops().open_event(options_.device, handle)
                                              : from_raw<std::uintptr_t>(handle));
    }
    owned_ = reach_ == Reach::host;
  }

  bool done() const {
    return std::all_of(events_.begin(), events_.end(),
                       [this](std::uintptr_t event) { return ops().event_done(options_.device, event); });
  }
  bool there() const { return !events_.empty(); }
  void record(std::int64_t slot, Stream stream) { ops().record(events_[static_cast<std::size_t>(slot)], stream); }
  void block(std::int64_t slot, Stream stream) { ops().wait_event(stream, events_[static_cast<std::size_t>(slot)]); }
  void clear() noexcept {
    if (owned_)
      for (const std::uintptr_t event : events_) ops().drop_event(options_.device, event);
    events_.clear();
  }

 private:
  DeviceOps& ops() const { return *options_.ops; }
  const LaneOptions options_;
  const Reach reach_;
  std::vector<std::uintptr_t> events_;
  bool owned_ = false;
};

class PushSender final : public SendLane {
 public:
  PushSender(const LaneOptions& options, Reach reach, std::unique_ptr<Mover> mover)
      : SendLane(options),
        reach_(reach),
        mover_(std::move(mover)),
        arrived_(options, reach),
        freed_(options, reach),
        slots_(static_cast<std::size_t>(options.slots)) {}
  ~PushSender() override { close(); }

  std::string backend() const override { return backend_of(reach_, mover_->name()); }

  void begin(ControlLink& link, bool) override {
    arrived_.make();
    link.queue({FrameType::events, 0, 0, 0, 0, arrived_.exported()});
    mover_->begin();
  }
  bool connected() override { return freed_.there() && mover_->connected(); }

  void on_frame(const Frame& frame, ControlLink&) override {
    if (detached_) return;
    if (frame.type == FrameType::events) return freed_.open(frame.payload);
    check_value(frame.type == FrameType::slot && frame.a >= 0 && frame.a < options_.slots,
                "the receiver of a pushed message sent what only a sender sends");
    Slot& slot = slots_[static_cast<std::size_t>(frame.a)];
    if (reach_ == Reach::host) {
      slot.address = options_.ops->open_memory(options_.device, frame.payload);
      opened_.push_back(slot.address);
    } else {
      slot.address = from_raw<void*>(frame.payload);
    }
    slot.bytes = frame.b;
    slot.asked = false;
  }

  bool ready(std::int64_t number, std::int64_t bytes, ControlLink& link) override {
    Slot& slot = slots_[static_cast<std::size_t>(number)];
    if (bytes <= slot.bytes) return true;
    if (!slot.asked) link.queue({FrameType::need, number, bytes, 0, 0, {}});
    slot.asked = true;
    return false;
  }

  void issue(const Transfer& transfer) override {
    freed_.block(transfer.slot, stream());
    if (transfer.layout->bytes > 0)
      mover_->move(stream(), transfer, slots_[static_cast<std::size_t>(transfer.slot)].address);
    arrived_.record(transfer.slot, stream());
  }

  void capture(const Transfer&, Stream) override { refuse_capture(backend()); }
  void join_captured(Stream) override {}

  std::string trouble() override { return mover_->trouble(); }
  void abort() noexcept override { mover_->abort(); }
  // The receiver must not give back what is open here: to CUDA that is undefined behaviour.
  void detach() noexcept override {
    detached_ = true;
    for (void* address : opened_) options_.ops->close_memory(options_.device, address);
    opened_.clear();
    freed_.clear();
  }
  void finish() noexcept override { mover_->finish(); }
  void close() noexcept override {
    mover_->close();
    detach();
  }

 private:
  struct Slot {
    void* address = nullptr;
    std::int64_t bytes = 0;
    bool asked = false;
  };
  const Reach reach_;
  const std::unique_ptr<Mover> mover_;
  Signals arrived_, freed_;  // recorded here, and by the receiver
  std::vector<Slot> slots_;
  std::vector<void*> opened_;
  bool detached_ = false;
};

class PushReceiver final : public RecvLane {
 public:
  PushReceiver(const LaneOptions& options, Reach reach, std::string mover)
      : RecvLane(options),
        reach_(reach),
        mover_(std::move(mover)),
        arrived_(options, reach),
        freed_(options, reach),
        memory_(
            options.slots,
            [options](std::int64_t bytes) {
              return options.ops->allocate(options.device, static_cast<std::size_t>(bytes));
            },
            [options](void* address) { options.ops->release(options.device, address); },
            reach == Reach::host ? kSharedGranule : 512) {
    for (std::int64_t i = 0; i < options.slots; ++i) here_.emplace_back(options.ops, options.device);
  }

  std::string backend() const override { return backend_of(reach_, mover_); }

  void begin(ControlLink& link, bool) override {
    freed_.make();
    link.queue({FrameType::events, 0, 0, 0, 0, freed_.exported()});
  }
  bool connected() override { return arrived_.there(); }

  void on_frame(const Frame& frame, ControlLink& link) override {
    if (detached_) return;
    if (frame.type == FrameType::events) return arrived_.open(frame.payload);
    check_value(frame.type == FrameType::need && frame.a >= 0 && frame.a < options_.slots && frame.b > 0,
                "the sender of a pushed message sent what only a receiver sends");
    memory_.ensure(frame.a, frame.b);
    void* address = memory_.address(frame.a);
    link.queue({FrameType::slot, frame.a, memory_.bytes(frame.a), 0, 0,
                reach_ == Reach::host ? options_.ops->export_memory(options_.device, address) : raw(address)});
  }

  // The sender has recorded the event before it told of the message. What computes waits for an event of this side,
  // since it may get to that when the sender's has gone.
  void post(const Transfer& transfer) override {
    if (detached_) return;  // the receiver has left
    arrived_.block(transfer.slot, stream());
    here_[static_cast<std::size_t>(transfer.slot)].record(stream());
  }
  void capture(const Transfer&, Stream) override { refuse_capture(backend()); }

  std::uintptr_t address(std::int64_t slot) const override {
    return reinterpret_cast<std::uintptr_t>(memory_.address(slot));
  }
  void wait_arrived(std::int64_t slot, Stream stream) override { here_[static_cast<std::size_t>(slot)].block(stream); }
  void free(std::int64_t slot, Stream stream) override { freed_.record(slot, stream); }
  bool all_freed() override { return freed_.done(); }
  std::int64_t ring_bytes() const override { return memory_.total(); }

  void abort() noexcept override {}
  void detach() noexcept override {
    detached_ = true;
    arrived_.clear();
  }
  void close() noexcept override { detach(); }

 private:
  const Reach reach_;
  const std::string mover_;
  Signals arrived_, freed_;  // recorded by the sender, and here
  std::vector<Event> here_;  // behind `arrived_`
  SlotMemory memory_;
  bool detached_ = false;
};

}  // namespace

std::unique_ptr<Mover> make_copy_mover(std::shared_ptr<DeviceOps> ops) {
  return std::make_unique<CopyMover>(std::move(ops));
}

std::unique_ptr<SendLane> make_push_sender(const LaneOptions& options, Reach reach, std::unique_ptr<Mover> mover) {
  return std::make_unique<PushSender>(options, reach, std::move(mover));
}

std::unique_ptr<RecvLane> make_push_receiver(const LaneOptions& options, Reach reach, std::string mover) {
  return std::make_unique<PushReceiver>(options, reach, std::move(mover));
}

}  // namespace paci_rt
