// The engine of point-to-point transfers on a device: one for each process (or thread that acts as one), with all of
// its channels, a thread that issues and a thread that watches. How bytes move is a lane's business (lane.hpp).
//
// Protocol of a channel. The computing thread hands a message over and goes on. The issuing thread issues it once the
// slot that it goes to is known to be vacant, and then tells the other side, whose issuing thread posts the receive at
// once, whatever its computing thread does. Taking a message makes a stream wait, not a thread; only a message that the
// sender has not issued yet is waited for on the host. A slot is vacant when the work that reads it has been issued;
// the device waits for the rest.
//
// So all work on a device depends on nothing but work that has been issued already, on both sides: it comes to an end
// even if a process then waits for its whole device, gives memory back or loads a kernel. See csrc/DESIGN.md.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "p2p/channel.hpp"
#include "p2p/lane.hpp"

namespace paci_rt {

class DeviceEngine;

// What both kinds of ends share: the link, and how far it has come. The link is the issuing thread's alone.
struct LinkState {
  enum class Phase { hello, connecting, settling, warming, ready };
  LinkState(std::unique_ptr<ControlLink> made, Event warm) : link(std::move(made)), warm(std::move(warm)) {}

  std::unique_ptr<ControlLink> link;
  Event warm;  // behind the first transfer
  Phase phase = Phase::hello;
  bool hello_sent = false, bye_sent = false, abort_sent = false, bye = false, gone = false;
  std::int64_t trouble_ns = 0;  // when the lane said so first; the peer's goodbye may be on its way
};

// Issued, and not known to be done.
struct InFlight {
  std::int64_t sequence, index, slot, bytes, issued_ns;
  Event done;
};

void forget_done(std::deque<InFlight>& transfers);

class DeviceOutgoing final : public Outgoing {
 public:
  DeviceOutgoing(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                 std::unique_ptr<SendLane> lane);

  std::int64_t send(std::int64_t index, std::shared_ptr<const Layout> layout,
                    const std::vector<std::uintptr_t>& addresses, Stream stream) override;
  bool has_room() override { return true; }  // messages without a credit wait here, not their sender
  std::int64_t completed() override;
  void flush() override;
  Progress progress() const override;
  void close() override;

  // Sends within the CUDA graph that is being recorded on `stream`. Throws OrderError where earlier messages still
  // wait for a credit.
  void capture(std::int64_t index, std::shared_ptr<const Layout> layout, const std::vector<std::uintptr_t>& addresses,
               Stream stream);
  void join_captured(Stream stream);

 private:
  friend class DeviceEngine;
  struct Pending {
    Transfer transfer;
    Event ready;
  };

  // All with the engine's mutex held.
  bool advance(std::unique_lock<std::mutex>& lock);  // issues one message if it can
  void on_frame(const Frame& frame);
  void poll_done();
  void check_deadline();
  bool idle() const { return pending_.empty() && in_flight_.empty() && !issuing_; }
  Waiting waiting_for(std::int64_t index, std::int64_t slot, std::int64_t bytes, std::string doing) const;

  DeviceEngine& engine_;
  LinkState state_;
  std::unique_ptr<SendLane> lane_;
  std::deque<Pending> pending_;
  std::deque<InFlight> in_flight_;
  std::vector<bool> vacant_;
  std::shared_ptr<const Layout> announced_;
  bool issuing_ = false;
  std::int64_t next_ = 0, last_index_ = kNone, told_ = kNone;
  std::atomic<std::int64_t> completed_{kNone}, peer_taken_{kNone};  // read without the mutex, for error messages
};

class DeviceIncoming final : public Incoming {
 public:
  DeviceIncoming(DeviceEngine& engine, Edge edge, Options options, std::unique_ptr<ControlLink> link,
                 std::unique_ptr<RecvLane> lane);

  void post() override {}  // the issuing thread does, as soon as it may
  bool ready() override;
  // The tensors lie in a slot. Copy them out with work on `stream`, then drop the lease, which frees the slot behind
  // that work.
  Arrival take(std::int64_t index, Stream stream) override;
  std::int64_t held() const override;
  Progress progress() const override;
  void close() override;

  // Receives into `addresses` within the CUDA graph that is being recorded on `stream`. Throws OrderError where
  // earlier messages have not been taken.
  void capture(std::int64_t index, std::shared_ptr<const Layout> layout, const std::vector<std::uintptr_t>& addresses,
               Stream stream);
  // The layout of the last message taken; null before the first.
  std::shared_ptr<const Layout> layout() const;
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
  void poll_done();
  void check_deadline();
  bool idle() const { return announced_.empty() && in_flight_.empty() && !posting_; }
  void vacate(std::int64_t slot, Stream stream) noexcept;
  void wait_for_message(std::unique_lock<std::mutex>& lock, std::int64_t index);
  Slot& at(std::int64_t slot) { return slots_[static_cast<std::size_t>(slot)]; }
  Waiting waiting_for(std::int64_t index, std::int64_t slot, std::int64_t bytes, std::string doing) const;

  DeviceEngine& engine_;
  LinkState state_;
  std::unique_ptr<RecvLane> lane_;
  std::deque<Transfer> announced_;
  std::deque<InFlight> in_flight_;
  std::vector<Slot> slots_;
  std::deque<std::int64_t> vacated_;  // slots to tell the sender about
  std::shared_ptr<const Layout> layout_, taken_layout_;
  bool posting_ = false;
  std::int64_t next_post_ = 0, last_index_ = kNone;
  std::atomic<std::int64_t> next_take_{0}, peer_completed_{kNone};
};

class DeviceEngine : public std::enable_shared_from_this<DeviceEngine> {
 public:
  // `stage` names this side to others. `options.poll` is called by threads that wait.
  DeviceEngine(std::shared_ptr<DeviceOps> ops, int device, int stage, Options options);
  ~DeviceEngine();
  DeviceEngine(const DeviceEngine&) = delete;
  DeviceEngine& operator=(const DeviceEngine&) = delete;

  // What a lane for this engine is to be made with.
  LaneOptions lane_options(int priority) const;
  DeviceOutgoing& add(Edge edge, std::unique_ptr<ControlLink> link, std::unique_ptr<SendLane> lane);
  DeviceIncoming& add(Edge edge, std::unique_ptr<ControlLink> link, std::unique_ptr<RecvLane> lane);

  // Connects what was added since the last call, and returns when the other sides have done so too. Throws
  // TransferTimeout, PeerLost, NcclError, or std::invalid_argument where the two sides want different things.
  void connect();

  void check();                             // throws what ended it
  void fail(std::exception_ptr error);      // the first one counts; all channels end, here and at all neighbours
  void give_up(const std::string& origin);  // the same for a failure outside; `origin` is what others are told
  void close();                             // idempotent
  bool failed() const { return stop_->load(); }
  int device() const { return device_; }
  int multiprocessors() const { return ops_->multiprocessors(device_); }
  std::string json();  // what every channel did lately

 private:
  friend class DeviceOutgoing;
  friend class DeviceIncoming;

  std::shared_ptr<void> enter_device();
  void issue_loop();
  void watch_loop();
  struct Ends {  // as of a moment; ends are only ever added
    std::vector<DeviceOutgoing*> outgoing;
    std::vector<DeviceIncoming*> incoming;
    template <typename Work>
    void for_each(const Work& work) const {
      for (DeviceOutgoing* end : outgoing) work(*end);
      for (DeviceIncoming* end : incoming) work(*end);
    }
  };
  Ends ends();
  void poll_links();  // sleeps until there is something to do
  template <typename End>
  void serve(End& end);  // reads, connects, says goodbye, writes
  template <typename End>
  void greet(End& end, const Frame& hello);
  template <typename End>
  void go_on_connecting(End& end);
  template <typename End>
  void handle(End& end, const Frame& frame);
  void fail_locked(const std::exception_ptr& error);  // with the mutex held, as `lose`
  template <typename End>
  void lose(End& end, const std::string& origin);
  bool advance_one();
  void look_for_trouble();
  void abort_lanes();
  void drop_lanes();
  void wake();
  // Sleeps for a slice of time or until something changes, and calls the caller's poll without the lock.
  void wait(std::unique_lock<std::mutex>& lock);
  void throw_if_failed() const;  // with the mutex held
  bool wait_for(std::unique_lock<std::mutex>& lock, double seconds, const std::function<bool()>& done);
  Event take_event();  // with the mutex held, as the next
  void give_event(Event event) { spare_events_.push_back(std::move(event)); }
  template <typename Work>
  void for_each_end(const Work& work) {
    for (const auto& end : outgoing_) work(*end);
    for (const auto& end : incoming_) work(*end);
  }

  const std::shared_ptr<DeviceOps> ops_;
  const int device_, stage_;
  const Options options_;
  const std::shared_ptr<std::atomic<bool>> stop_;

  std::mutex mutex_;        // the state of all ends
  std::mutex issue_mutex_;  // calls of lanes that put work on their streams; never taken with mutex_ held
  std::condition_variable changed_, watch_;
  std::vector<std::unique_ptr<DeviceOutgoing>> outgoing_;
  std::vector<std::unique_ptr<DeviceIncoming>> incoming_;
  std::vector<Event> spare_events_;
  std::exception_ptr failure_;
  std::string last_words_;
  bool aborted_ = false, leaving_ = false, stopping_ = false, closed_ = false;
  int wake_fd_ = -1;
  std::thread issuer_, watchdog_;
};

}  // namespace paci_rt
