// The device engine's issuing thread: it connects channels, reads what the other sides say, and issues transfers.
#include <poll.h>
#include <unistd.h>

#include "p2p/device_engine.hpp"

namespace paci_rt {
namespace {

constexpr std::int64_t kProtocol = 1;

Frame hello_of(const Edge& edge, const Lane& lane, std::int64_t slots) {
  return {FrameType::hello, kProtocol, slots, lane.can_register() ? 1 : 0, 0, lane.backend() + "\n" + edge.name()};
}

}  // namespace

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
  if ((failure_ ? aborted_ : leaving_) && end.idle() && !state.bye_sent) say_bye(end, lock);
  state.gone = !state.link->broken().empty();
  if (!state.gone || state.bye || failure_ || leaving_) return;
  lose(end, concat("stage ", end.peer(), " is gone: ", state.link->broken()));
}

template <typename End>
void DeviceEngine::say_bye(End& end, std::unique_lock<std::mutex>& lock) {
  lock.unlock();  // it may wait for the device
  {
    const std::lock_guard<std::mutex> issuing(issue_mutex_);
    end.lane_->detach();
  }
  lock.lock();
  end.state_.bye_sent = true;
  end.state_.link->queue({FrameType::bye, 0, 0, 0, 0, {}});
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

}  // namespace paci_rt
