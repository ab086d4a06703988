#include "p2p/device_engine.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace paci_rt {
namespace {

constexpr std::int64_t kProtocol = 1;
constexpr int kConnectSliceMs = 1;                  // how often a lane that connects is asked how far it is
constexpr int kWatchMs = 10;                        // how often transfers under way are looked at
constexpr double kLeaveS = 5.0;                     // how long the end of a channel waits for the other side's
constexpr int kStuckMs = 1000;                      // how long an abort waits for who issues
constexpr std::int64_t kTroubleNs = 1'000'000'000;  // how long trouble of a lane may turn out to be a goodbye

// What the neighbours are told: of the first stage to go, as far as this one knows.
std::string origin_of(const std::exception_ptr& error, int stage) {
  try {
    std::rethrow_exception(error);
  } catch (const PeerLost& lost) {
    return lost.origin;
  } catch (const std::exception& known) {
    return concat("stage ", stage, " failed: ", known.what());
  } catch (...) {
    return concat("stage ", stage, " failed");
  }
}

Frame hello_of(const Edge& edge, const Lane& lane, std::int64_t slots) {
  return {FrameType::hello, kProtocol, slots, lane.can_register() ? 1 : 0, 0, lane.backend() + "\n" + edge.name()};
}

}  // namespace

DeviceEngine::DeviceEngine(std::shared_ptr<DeviceOps> ops, int device, int stage, Options options)
    : ops_(std::move(ops)),
      device_(device),
      stage_(stage),
      options_(std::move(options)),
      stop_(std::make_shared<std::atomic<bool>>(false)) {
  ops_->check_device(device_);
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd_ < 0) throw ResourceError(concat("no eventfd: ", std::strerror(errno), "; close some files"));
  issuer_ = std::thread([this] { issue_loop(); });
  watchdog_ = std::thread([this] { watch_loop(); });
}

DeviceEngine::~DeviceEngine() {
  close();
  ::close(wake_fd_);
  drop_lanes();
}

// Gives memory back. Slots may be read until the work is done that was issued before their leases went; one that is
// still leased waits for its lease, which holds the engine, and what never ends keeps its memory.
void DeviceEngine::drop_lanes() {
  for (const auto& end : outgoing_) end->lane_.reset();
  const std::int64_t limit = now_ns() + static_cast<std::int64_t>(kLeaveS * 1e9);
  for (const auto& end : incoming_) {
    if (end->lane_ == nullptr || end->held() > 0) continue;
    bool done = false;
    try {
      while (!(done = end->lane_->all_freed()) && now_ns() < limit) std::this_thread::yield();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "paci_rt: %s\n", error.what());
    }
    if (!done) {
      std::fprintf(stderr, "paci_rt: the slots of %s are still read, and are not given back\n",
                   end->edge().name().c_str());
      (void)end->lane_.release();
    }
    end->lane_.reset();
  }
}

LaneOptions DeviceEngine::lane_options(int priority) const {
  return {ops_, device_, priority, options_.slots, options_.timeout_s, stop_};
}

DeviceOutgoing& DeviceEngine::add(Edge edge, std::unique_ptr<ControlLink> link, std::unique_ptr<SendLane> lane) {
  check();
  auto end = std::make_unique<DeviceOutgoing>(*this, std::move(edge), options_, std::move(link), std::move(lane));
  const std::lock_guard<std::mutex> lock(mutex_);
  outgoing_.push_back(std::move(end));
  wake();
  return *outgoing_.back();
}

DeviceIncoming& DeviceEngine::add(Edge edge, std::unique_ptr<ControlLink> link, std::unique_ptr<RecvLane> lane) {
  check();
  auto end = std::make_unique<DeviceIncoming>(*this, std::move(edge), options_, std::move(link), std::move(lane));
  const std::lock_guard<std::mutex> lock(mutex_);
  incoming_.push_back(std::move(end));
  wake();
  return *incoming_.back();
}

void DeviceEngine::connect() {
  std::unique_lock<std::mutex> lock(mutex_);
  const Endpoint* late = nullptr;
  const auto done = [&] {
    late = nullptr;
    for_each_end([&](const auto& end) {
      if (end.state_.phase != LinkState::Phase::ready) late = &end;
    });
    return late == nullptr;
  };
  if (wait_for(lock, options_.timeout_s, done)) return;
  const Edge& edge = late->edge();
  const int peer = edge.sender == stage_ ? edge.receiver : edge.sender;
  const auto error = std::make_exception_ptr(TransferTimeout(
      edge.name(),
      concat("edge ", edge.name(), " was not connected within ", options_.timeout_s, " s: see whether stage ", peer,
             " has started and makes the same channels, or raise transfer_timeout_s")));
  lock.unlock();
  fail(error);
  std::rethrow_exception(error);
}

// --- what ends it ---

void DeviceEngine::throw_if_failed() const {
  if (failure_) std::rethrow_exception(failure_);
}

void DeviceEngine::check() {
  const std::lock_guard<std::mutex> lock(mutex_);
  throw_if_failed();
  check_value(!closed_, "the transport is closed: make a new one");
}

void DeviceEngine::fail(std::exception_ptr error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  fail_locked(error);
}

void DeviceEngine::give_up(const std::string& origin) {
  const std::string action = concat("stage ", stage_);
  fail(std::make_exception_ptr(PeerLost(action, concat(action, " goes no further: ", origin), origin)));
}

void DeviceEngine::fail_locked(const std::exception_ptr& error) {
  if (failure_ || stopping_) return;
  failure_ = error;
  last_words_ = origin_of(error, stage_);
  stop_->store(true);
  changed_.notify_all();
  watch_.notify_all();
  wake();
}

void DeviceEngine::wake() {
  const std::uint64_t one = 1;
  if (::write(wake_fd_, &one, sizeof one) < 0 && errno != EAGAIN) std::perror("paci_rt: eventfd");
}

void DeviceEngine::wait(std::unique_lock<std::mutex>& lock) {
  changed_.wait_for(lock, std::chrono::milliseconds(kSliceMs));
  if (!options_.poll) return;
  lock.unlock();
  options_.poll();
  lock.lock();
}

bool DeviceEngine::wait_for(std::unique_lock<std::mutex>& lock, double seconds, const std::function<bool()>& done) {
  const std::int64_t end = now_ns() + static_cast<std::int64_t>(seconds * 1e9);
  while (!done()) {
    throw_if_failed();
    if (now_ns() > end) return false;
    wait(lock);
  }
  return true;
}

Event DeviceEngine::take_event() {
  if (spare_events_.empty()) return {ops_, device_};
  Event event = std::move(spare_events_.back());
  spare_events_.pop_back();
  return event;
}

// --- the issuing thread ---

// For a thread of the engine, as long as it lives. A thread begins on device 0, and the first call of CUDA or NCCL that
// finds no context current makes one there: half a gigabyte for every process whose device is another one.
std::shared_ptr<void> DeviceEngine::enter_device() {
  try {
    auto current = ops_->enter(device_);
    ops_->leave_captures_alone();
    return current;
  } catch (...) {
    fail(std::current_exception());
    return nullptr;
  }
}

void DeviceEngine::issue_loop() {
  const std::shared_ptr<void> current = enter_device();
  for (;;) {
    poll_links();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
    }
    try {
      const Ends now = ends();
      now.for_each([this](auto& end) { serve(end); });
      while (advance_one()) {
      }
      now.for_each([](auto& end) { end.state_.link->write(); });
    } catch (...) {
      fail(std::current_exception());
    }
    changed_.notify_all();
  }
}

DeviceEngine::Ends DeviceEngine::ends() {
  Ends found;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& end : outgoing_) found.outgoing.push_back(end.get());
  for (const auto& end : incoming_) found.incoming.push_back(end.get());
  return found;
}

void DeviceEngine::poll_links() {
  std::vector<pollfd> fds{{wake_fd_, POLLIN, 0}};
  int timeout_ms = -1;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for_each_end([&](const auto& end) {
      const LinkState& state = end.state_;
      if (state.phase != LinkState::Phase::hello && state.phase != LinkState::Phase::ready)
        timeout_ms = failure_ ? kSliceMs : kConnectSliceMs;
      if (!state.link->broken().empty()) return;
      fds.push_back({state.link->fd(), static_cast<short>(POLLIN | (state.link->unsent() ? POLLOUT : 0)), 0});
    });
  }
  ::poll(fds.data(), fds.size(), timeout_ms);
  std::uint64_t count = 0;
  while (::read(wake_fd_, &count, sizeof count) > 0) {
  }
}

template <typename End>
void DeviceEngine::serve(End& end) {
  LinkState& state = end.state_;
  if (!state.hello_sent) {
    state.hello_sent = true;
    state.link->queue(hello_of(end.edge(), *end.lane_, options_.slots));
  }
  while (const std::optional<Frame> frame = state.link->read()) handle(end, *frame);
  if (!failed()) go_on_connecting(end);
  std::unique_lock<std::mutex> lock(mutex_);
  if (failure_ && !state.abort_sent) {
    state.abort_sent = true;
    state.link->queue({FrameType::abort, 0, 0, 0, 0, last_words_.substr(0, 4096)});
  }
  if ((failure_ ? aborted_ : leaving_) && end.idle() && !state.bye_sent) {
    lock.unlock();  // it may wait for the device
    {
      const std::lock_guard<std::mutex> issuing(issue_mutex_);
      end.lane_->detach();
    }
    lock.lock();
    state.bye_sent = true;
    state.link->queue({FrameType::bye, 0, 0, 0, 0, {}});
  }
  state.gone = !state.link->broken().empty();
  if (!state.gone || state.bye || failure_ || leaving_) return;
  lose(end, concat("stage ", end.peer(), " is gone: ", state.link->broken()));
}

template <typename End>
void DeviceEngine::lose(End& end, const std::string& origin) {
  try {
    end.lose(end.waiting_for(end.last_index_ + 1, kNone, kNone, {}), origin);
  } catch (...) {
    fail_locked(std::current_exception());
  }
}

template <typename End>
void DeviceEngine::handle(End& end, const Frame& frame) {
  LinkState& state = end.state_;
  switch (frame.type) {
    case FrameType::hello:
      return greet(end, frame);
    case FrameType::events:
    case FrameType::need:
    case FrameType::slot: {
      if (failed()) return;
      const std::lock_guard<std::mutex> issuing(issue_mutex_);
      return end.lane_->on_frame(frame, *state.link);
    }
    default:
      break;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (frame.type == FrameType::bye) {
    state.bye = true;
  } else if (frame.type == FrameType::abort) {
    if (!failure_) lose(end, frame.payload);
  } else {
    end.on_frame(frame);
  }
}

template <typename End>
void DeviceEngine::greet(End& end, const Frame& hello) {
  const Frame mine = hello_of(end.edge(), *end.lane_, options_.slots);
  const auto differ = [&](const char* what, const auto& here, const auto& there) {
    check_value(here == there, "edge ", end.edge().name(), ": ", what, " is ", here, " here and ", there,
                " on the other side: give both the same");
  };
  differ("the protocol's version", mine.a, hello.a);
  differ("slots", mine.b, hello.b);
  differ("the backend and edge", mine.payload, hello.payload);
  const std::lock_guard<std::mutex> issuing(issue_mutex_);
  end.lane_->begin(*end.state_.link, mine.c != 0 && hello.c != 0);
  const std::lock_guard<std::mutex> lock(mutex_);
  end.state_.phase = LinkState::Phase::connecting;
}

template <typename End>
void DeviceEngine::go_on_connecting(End& end) {
  using Phase = LinkState::Phase;
  LinkState& state = end.state_;
  const auto enter = [&](Phase phase) {
    const std::lock_guard<std::mutex> lock(mutex_);
    state.phase = phase;
  };
  if (state.phase == Phase::connecting || state.phase == Phase::settling) {
    const std::lock_guard<std::mutex> issuing(issue_mutex_);
    if (state.phase == Phase::connecting) {
      if (!end.lane_->connected()) return;
      end.lane_->warm_up();
      enter(Phase::settling);
    }
    if (!end.lane_->settled()) return;
    state.warm.record(end.lane_->stream());
    enter(Phase::warming);
  }
  if (state.phase != Phase::warming || !state.warm.done()) return;
  end.events_->note(Moment::open, kNone, kNone, kNone, kNone);
  enter(Phase::ready);
}

bool DeviceEngine::advance_one() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (failure_ || stopping_) return false;
  bool advanced = false;
  // Receives first: the other side's kernels wait for them already.
  for (std::size_t i = 0; i < incoming_.size(); ++i) advanced |= incoming_[i]->advance(lock);
  for (std::size_t i = 0; i < outgoing_.size(); ++i) advanced |= outgoing_[i]->advance(lock);
  return advanced;
}

// --- the watching thread ---

void DeviceEngine::watch_loop() {
  const std::shared_ptr<void> current = enter_device();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (failure_ && !aborted_) {
      lock.unlock();
      abort_lanes();
      lock.lock();
      aborted_ = true;
      changed_.notify_all();
    } else if (failure_) {
      // The other sides wait for this one's last transfer before they give memory back.
      for_each_end([](auto& end) { end.poll_done(); });
      wake();
    } else {
      try {
        for_each_end([](auto& end) {
          end.poll_done();
          end.check_deadline();
        });
        lock.unlock();
        look_for_trouble();
        lock.lock();
      } catch (...) {
        const std::exception_ptr error = std::current_exception();
        if (lock.owns_lock()) lock.unlock();
        fail(error);
        lock.lock();
        continue;
      }
    }
    bool busy = false;
    for_each_end([&](const auto& end) { busy |= !end.idle() || end.state_.phase != LinkState::Phase::ready; });
    if (stopping_ || (failure_ && !aborted_)) continue;
    watch_.wait_for(lock, std::chrono::milliseconds(busy ? kWatchMs : 10 * kSliceMs));
  }
}

void DeviceEngine::look_for_trouble() {
  // While something is being issued, its own calls report what is wrong.
  const std::unique_lock<std::mutex> issuing(issue_mutex_, std::try_to_lock);
  if (!issuing.owns_lock()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  for_each_end([&](auto& end) {
    LinkState& state = end.state_;
    if (state.bye || leaving_ || state.phase == LinkState::Phase::hello) return;
    const std::string trouble = end.lane_->trouble();
    if (trouble.empty()) {
      state.trouble_ns = 0;
    } else if (state.trouble_ns == 0) {
      state.trouble_ns = now_ns();
    } else if (now_ns() - state.trouble_ns > kTroubleNs) {
      lose(end, concat("stage ", stage_, " lost stage ", end.peer(), ": ", trouble));
    }
  });
}

void DeviceEngine::abort_lanes() {
  // Communicators must not be used while they are aborted; but who issues may be stuck in the driver.
  // (No try_lock_for: ThreadSanitizer does not know the call behind it.)
  std::unique_lock<std::mutex> issuing(issue_mutex_, std::try_to_lock);
  for (int waited_ms = 0; !issuing.owns_lock() && waited_ms < kStuckMs; ++waited_ms) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    (void)issuing.try_lock();
  }
  ends().for_each([](auto& end) { end.lane_->abort(); });
}

// --- the end ---

void DeviceEngine::close() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = leaving_ = true;
    wake();
    const std::int64_t end = now_ns() + static_cast<std::int64_t>(kLeaveS * 1e9);
    const auto all = [&](const auto& holds) {
      bool found = true;
      for_each_end([&](const auto& one) { found &= holds(one); });
      return found;
    };
    // First what is under way here, then the others' goodbyes, behind which nothing of theirs is under way either.
    while (now_ns() < end) {
      for_each_end([](auto& one) { one.poll_done(); });
      const bool over = all([&](const auto& one) {
        const LinkState& state = one.state_;
        return one.idle() && state.bye_sent && (state.bye || state.gone);
      });
      if (over) break;
      wake();
      changed_.wait_for(lock, std::chrono::milliseconds(kConnectSliceMs));
    }
    stopping_ = true;
    stop_->store(true);
    watch_.notify_all();
    wake();
  }
  issuer_.join();
  watchdog_.join();
  for_each_end([&](auto& end) {
    if (!failure_ && end.idle() && end.state_.bye) end.lane_->finish();
  });
  for_each_end([&](auto& end) {
    end.lane_->close();
    end.events_->note(Moment::close, kNone, kNone, kNone, kNone);
    if (failure_) end.state_.link->write();
  });
  drop_lanes();
}

std::string DeviceEngine::json() {
  std::string out = "[";
  ends().for_each([&](const auto& end) { out += concat(out.size() > 1 ? ", " : "", end.json()); });
  return out + "]";
}

}  // namespace paci_rt
