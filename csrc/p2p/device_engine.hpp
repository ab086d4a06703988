// The engine of point-to-point transfers on a device: one for each process (or thread that acts as one), with all of
// its channels, a thread that issues and a thread that watches. How bytes move is up to a lane (lane.hpp).
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
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "p2p/device_channel.hpp"

namespace paci_rt {

inline constexpr int kConnectSliceMs = 1;  // how often a lane that connects is asked how far it is

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
  template <typename Base, typename LaneOfBase>
  friend class DeviceEnd;
  friend class DeviceOutgoing;
  friend class DeviceIncoming;

  std::shared_ptr<void> enter_device();
  void drop_lanes();

  // The issuing thread (device_issuer.cpp).
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
  void issue_loop();
  void poll_links();  // sleeps until there is something to do
  template <typename End>
  void serve(End& end);  // reads, connects, says bye, writes
  template <typename End>
  void greet(End& end, const Frame& hello);
  template <typename End>
  void go_on_connecting(End& end);
  template <typename End>
  void handle(End& end, const Frame& frame);
  template <typename End>
  void say_bye(End& end, std::unique_lock<std::mutex>& lock);
  bool advance_one();

  // The watching thread (device_watchdog.cpp).
  void watch_loop();
  bool watch(std::unique_lock<std::mutex>& lock);  // false: it failed just now
  void look_for_trouble();
  void abort_lanes();

  void fail_locked(const std::exception_ptr& error);  // with the mutex held, as the next
  template <typename End>
  void lose(End& end, const std::string& origin) {
    try {
      end.lose(end.waiting_for(end.last_index_ + 1, kNone, kNone, {}), origin);
    } catch (...) {
      fail_locked(std::current_exception());
    }
  }
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
