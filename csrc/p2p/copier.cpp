#include "p2p/copier.hpp"

#include <pthread.h>

#include <csignal>
#include <utility>

#include "core/check.hpp"

namespace paci_rt {

Copier::Copier(std::int64_t from_bytes) : from_bytes_(from_bytes) {
  check_value(from_bytes >= 0, "from_bytes is ", from_bytes, ": messages have at least 0 bytes");
  // Signals are for the threads of Python, which looks at them between two waits.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Copier::~Copier() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
  }
  more_.notify_one();
  thread_.join();
}

void Copier::hand_over(std::function<void()> work) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
  }
  more_.notify_one();
}

void Copier::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [this] { return queue_.empty() && !busy_; });
}

void Copier::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    more_.wait(lock, [this] { return ends_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    work();
    lock.lock();
    busy_ = false;
    if (queue_.empty()) idle_.notify_all();
  }
}

}  // namespace paci_rt
