// The device engine's watching thread: deadlines, what a lane reports by itself, and the abort after a failure.
#include "p2p/device_engine.hpp"

namespace paci_rt {
namespace {

constexpr int kWatchMs = 10;                        // how often transfers under way are looked at
constexpr int kStuckMs = 1000;                      // how long an abort waits for who issues
constexpr std::int64_t kTroubleNs = 1'000'000'000;  // how long an error of a lane may turn out to be a normal end

}  // namespace

void DeviceEngine::watch_loop() {
  const std::shared_ptr<void> current = enter_device();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (!watch(lock)) continue;
    bool busy = false;
    for_each_end([&](const auto& end) { busy |= !end.idle() || end.state_.phase != LinkState::Phase::ready; });
    if (stopping_ || (failure_ && !aborted_)) continue;
    watch_.wait_for(lock, std::chrono::milliseconds(busy ? kWatchMs : 10 * kSliceMs));
  }
}

bool DeviceEngine::watch(std::unique_lock<std::mutex>& lock) {
  if (failure_ && !aborted_) {
    lock.unlock();
    abort_lanes();
    lock.lock();
    aborted_ = true;
    changed_.notify_all();
    return true;
  }
  if (failure_) {
    // The other sides wait for this one's last transfer before they give memory back.
    for_each_end([](auto& end) { end.poll_done(); });
    wake();
    return true;
  }
  try {
    for_each_end([](auto& end) {
      end.poll_done();
      end.check_deadline();
    });
    lock.unlock();
    look_for_trouble();
    lock.lock();
    return true;
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    fail_locked(std::current_exception());
    return false;
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

}  // namespace paci_rt
