// The two ends of a channel of the device engine (device_engine.hpp).
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "p2p/lane.hpp"

namespace paci_rt {

class DeviceEngine;

// How far the connection of a channel has come. The link is the issuing thread's alone.
struct LinkState {
  enum class Phase { hello, connecting, settling, warming, ready };
  LinkState(std::unique_ptr<ControlLink> made, Event warm) : link(std::move(made)), warm(std::move(warm)) {}

  std::unique_ptr<ControlLink> link;
  Event warm;  // behind the first transfer
  Phase phase = Phase::hello;
  bool hello_sent = false, bye_sent = false, abort_sent = false, bye = false, gone = false;
  std::int64_t trouble_ns = 0;  // when the lane first reported an error; the peer's bye may be on its way
};

// Issued, and not known to be done.
struct InFlight {
  std::int64_t sequence, index, slot, bytes, issued_ns;
  Event done;
};

// What both ends have in common: a link to the other side, a lane, and transfers under way on it. `Base` is Outgoing
// or Incoming. Everything but the constructor, `close` and `capture` is called with the engine's mutex held.
template <typename Base, typename LaneOfBase>
class DeviceEnd : public Base {
 public:
  void close() override;

  // Transfers within the CUDA graph that is being recorded on `stream`. Throws OrderError where earlier messages are
  // still waiting.
  void capture(std::int64_t index, std::shared_ptr<const Layout> layout, const std::vector<std::uintptr_t>& addresses,
               Stream stream);

 protected:
  DeviceEnd(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
            std::unique_ptr<LaneOfBase> lane);

  // Calls `work`, which puts the transfer on the lane's stream, without the engine's mutex.
  template <typename Work>
  void put_on_stream(std::unique_lock<std::mutex>& lock, const Transfer& transfer, const Work& work);
  void poll_done();
  void check_deadline();
  bool idle() const { return in_flight_.empty() && !issuing_ && queued() == 0; }

  virtual std::size_t queued() const = 0;  // messages that wait to be issued
  virtual void drop_queued() = 0;          // after a failure
  virtual void on_done(const InFlight& transfer) = 0;
  virtual const char* overdue() const = 0;     // what is wrong with a transfer past its deadline
  virtual std::string in_the_way() const = 0;  // of a CUDA graph, as a sentence; empty: nothing

  DeviceEngine& engine_;
  LinkState state_;
  std::unique_ptr<LaneOfBase> lane_;
  std::deque<InFlight> in_flight_;
  bool issuing_ = false;  // a call of the lane is under way
  std::int64_t last_index_ = kNone;
};

class DeviceOutgoing final : public DeviceEnd<Outgoing, SendLane> {
 public:
  DeviceOutgoing(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                 std::unique_ptr<SendLane> lane);

  std::int64_t send(std::int64_t index, std::shared_ptr<const Layout> layout,
                    const std::vector<std::uintptr_t>& addresses, Stream stream) override;
  bool has_room() override { return true; }  // messages without a credit wait here, not their sender
  std::int64_t completed() override;
  void flush() override;
  Progress progress() const override { return {completed_, peer_taken_}; }

  void join_captured(Stream stream);  // work on `stream` waits for what was captured

 private:
  friend class DeviceEngine;
  struct Pending {
    Transfer transfer;
    Event ready;
  };

  bool advance(std::unique_lock<std::mutex>& lock);  // issues one message if it can
  void on_frame(const Frame& frame);
  void check_flush(std::int64_t start_ns);  // throws where waiting makes no sense any more

  std::size_t queued() const override { return pending_.size(); }
  void drop_queued() override { pending_.clear(); }
  void on_done(const InFlight& transfer) override;
  const char* overdue() const override;
  std::string in_the_way() const override;

  std::deque<Pending> pending_;
  std::vector<bool> vacant_;
  std::shared_ptr<const Layout> announced_;
  std::int64_t next_ = 0, told_ = kNone;
  std::atomic<std::int64_t> completed_{kNone}, peer_taken_{kNone};  // read without the mutex, for error messages
};

class DeviceIncoming final : public DeviceEnd<Incoming, RecvLane> {
 public:
  DeviceIncoming(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                 std::unique_ptr<RecvLane> lane);

  void post() override {}  // the issuing thread does, as soon as it may
  bool ready() override;
  // The tensors lie in a slot. Copy them out with work on `stream`, then drop the lease, which frees the slot behind
  // that work.
  Arrival take(std::int64_t index, Stream stream) override;
  std::int64_t held() const override;
  Progress progress() const override { return {peer_completed_, next_take_ - 1}; }

  std::shared_ptr<const Layout> layout() const;  // of the last message taken; null before the first
  std::int64_t ring_bytes() const { return lane_ == nullptr ? 0 : lane_->ring_bytes(); }
  const std::shared_ptr<DeviceOps>& ops() const;

 private:
  friend class DeviceEngine;
  enum class SlotState { vacant, posted, taken };
  struct Slot {
    SlotState state = SlotState::vacant;
    Transfer transfer;
  };

  bool advance(std::unique_lock<std::mutex>& lock);
  void on_frame(const Frame& frame);
  void vacate(std::int64_t slot, Stream stream) noexcept;
  Transfer take_next(std::int64_t index);  // waits for it
  void wait_for_message(std::unique_lock<std::mutex>& lock, std::int64_t index);
  Slot& at(std::int64_t slot) { return slots_[static_cast<std::size_t>(slot)]; }

  std::size_t queued() const override { return announced_.size(); }
  void drop_queued() override { announced_.clear(); }
  void on_done(const InFlight& transfer) override;
  const char* overdue() const override;
  std::string in_the_way() const override;

  std::deque<Transfer> announced_;
  std::vector<Slot> slots_;
  std::deque<std::int64_t> vacated_;  // slots to tell the sender about
  std::shared_ptr<const Layout> layout_, taken_layout_;
  std::int64_t next_post_ = 0;
  std::atomic<std::int64_t> next_take_{0}, peer_completed_{kNone};
};

}  // namespace paci_rt
