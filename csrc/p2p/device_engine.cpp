#include "p2p/device_engine.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace paci_rt {
namespace {

constexpr double kLeaveS = 5.0;  // how long the end of a channel waits for the other side's

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

}  // namespace

DeviceEngine::DeviceEngine(std::shared_ptr<DeviceOps> ops, int device, int stage, Options options)
    : ops_(std::move(ops)),
      device_(device),
      stage_(stage),
      options_(std::move(options)),
      stop_(std::make_shared<std::atomic<bool>>(false)) {
  options_.check();
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
  const std::lock_guard<std::mutex> issuing(issue_mutex_);
  for (const auto& end : outgoing_) end->lane_.reset();
  const std::int64_t limit = now_ns() + ns_of(kLeaveS);
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
  const std::int64_t end = now_ns() + ns_of(seconds);
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

// --- the end ---

void DeviceEngine::close() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = leaving_ = true;
    wake();
    const std::int64_t end = now_ns() + ns_of(kLeaveS);
    const auto all = [&](const auto& holds) {
      bool found = true;
      for_each_end([&](const auto& one) { found &= holds(one); });
      return found;
    };
    // First what is under way here, then the others' byes, after which nothing of theirs is under way either.
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
