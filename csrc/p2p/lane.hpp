// How the bytes of one channel move on a device: the part of the engine (p2p_device.hpp) that differs between NCCL and
// copies. A lane has a stream of its own, so that no channel waits for another.
//
// The engine's issuing thread calls a lane, with the issue lock held; what says otherwise is called by other threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/device_ops.hpp"
#include "core/event.hpp"
#include "p2p/channel.hpp"
#include "p2p/control_link.hpp"

namespace paci_rt {

struct Transfer {
  std::int64_t sequence = kNone;
  std::int64_t index = kNone;
  std::int64_t slot = kNone;
  std::shared_ptr<const Layout> layout;
  std::vector<std::uintptr_t> addresses;  // of the sender's tensors, or where captured receives go
};

struct LaneOptions {
  std::shared_ptr<DeviceOps> ops;
  int device = 0;
  int priority = 0;  // of the stream; lower numbers go first
  std::int64_t slots = 4;
  double timeout_s = 300.0;
  std::shared_ptr<std::atomic<bool>> stop = std::make_shared<std::atomic<bool>>(false);  // the engine has failed
};

class Lane {
 public:
  explicit Lane(const LaneOptions& options)
      : options_(options), stream_(StreamHandle::make(options.ops, options.device, options.priority)) {}
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  virtual ~Lane() = default;

  virtual std::string backend() const = 0;  // both sides must have the same
  virtual bool can_register() const { return false; }
  Stream stream() const { return stream_.get(); }

  // Connecting, none of which may wait for the other side, whose lanes may come in another order: `begin` starts it,
  // `connected` is asked until it says so, `warm_up` calls for a first transfer, `settled` is asked until it has been
  // issued, and the end of the stream's work is the end of it all. `registered` is what both sides can.
  virtual void begin(ControlLink& link, bool registered) = 0;
  virtual bool connected() = 0;
  virtual void warm_up() {}
  virtual bool settled() { return true; }
  virtual void on_frame(const Frame&, ControlLink&) {}

  // Whatever the library says has gone wrong by itself; empty: nothing.
  virtual std::string trouble() { return {}; }
  // After a failure, perhaps without the issue lock where its holder is stuck: nothing on the stream waits for the
  // other side from here on, as far as that is in the lane's hands.
  virtual void abort() noexcept = 0;
  // Before this side says bye, with nothing of its own under way, and none to come: gives back what belongs to the
  // other side, which takes it for gone from then on.
  virtual void detach() noexcept {}
  // At the end, by one thread, with nothing under way: first `finish` for all lanes whose other sides end as well,
  // since communicators end together, then `close` for all.
  virtual void finish() noexcept {}
  virtual void close() noexcept = 0;

 protected:
  const LaneOptions options_;
  const StreamHandle stream_;
};

class SendLane : public Lane {
 public:
  using Lane::Lane;
  // Whether the slot on the other side holds so many bytes; if not, has asked for it.
  virtual bool ready(std::int64_t slot, std::int64_t bytes, ControlLink&) { return (void)slot, (void)bytes, true; }
  virtual void issue(const Transfer& transfer) = 0;
  // Instead, as part of the CUDA graph that is being recorded on `from`; by the thread that records.
  virtual void capture(const Transfer& transfer, Stream from) = 0;
  virtual void join_captured(Stream to) = 0;  // captured work on `to` waits for what was captured here
};

class RecvLane : public Lane {
 public:
  using Lane::Lane;
  // Work on the lane's stream that follows finds the message there.
  virtual void post(const Transfer& transfer) = 0;
  virtual void capture(const Transfer& transfer, Stream from) = 0;  // and `from` waits for it

  // By the thread that takes messages.
  virtual std::uintptr_t address(std::int64_t slot) const = 0;
  virtual void wait_arrived(std::int64_t slot, Stream stream) = 0;
  virtual void free(std::int64_t slot, Stream stream) = 0;  // after all work on `stream` so far
  virtual bool all_freed() = 0;                             // whether that work is done, for every slot
  virtual std::int64_t ring_bytes() const = 0;
};

// The receiving side's buffers, which grow to the largest message that each has held.
class SlotMemory {
 public:
  using Allocate = std::function<void*(std::int64_t bytes)>;
  using Release = std::function<void(void*)>;

  // Sizes are multiples of `granule`.
  SlotMemory(std::int64_t slots, Allocate allocate, Release release, std::int64_t granule = 512)
      : slots_(static_cast<std::size_t>(slots)),
        granule_(granule),
        allocate_(std::move(allocate)),
        release_(std::move(release)) {}
  ~SlotMemory() { clear(); }

  // Returns whether it moved. What a slot held before stays until `clear`: work on it may not be done, and giving
  // device memory back waits for the whole device.
  bool ensure(std::int64_t slot, std::int64_t bytes) {
    Slot& at = slots_[static_cast<std::size_t>(slot)];
    if (bytes <= at.bytes) return false;
    const std::int64_t grown = (std::max(bytes, at.bytes + at.bytes / 2) + granule_ - 1) / granule_ * granule_;
    void* fresh = allocate_(grown);
    all_.push_back(fresh);
    total_ += grown;
    at = {fresh, grown};
    return true;
  }
  void* address(std::int64_t slot) const { return slots_[static_cast<std::size_t>(slot)].address; }
  std::int64_t bytes(std::int64_t slot) const { return slots_[static_cast<std::size_t>(slot)].bytes; }
  std::int64_t total() const { return total_; }

  void clear() noexcept {
    for (void* address : all_) release_(address);
    all_.clear();
    for (Slot& slot : slots_) slot = {};
  }

 private:
  struct Slot {
    void* address = nullptr;
    std::int64_t bytes = 0;
  };
  std::vector<Slot> slots_;
  const std::int64_t granule_;
  std::vector<void*> all_;
  std::atomic<std::int64_t> total_{0};
  Allocate allocate_;
  Release release_;
};

}  // namespace paci_rt
