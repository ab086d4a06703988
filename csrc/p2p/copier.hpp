// A thread that does work in the order in which it was handed over, beside the thread that computes.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace paci_rt {

// Sleeps while there is nothing to do. Work must not throw. One thread hands work over and asks.
class Copier {
 public:
  // From here on a message is worth it: waking a thread takes about as long as copying this much.
  static constexpr std::int64_t kFromBytes = std::int64_t{256} << 10;

  explicit Copier(std::int64_t from_bytes = kFromBytes);
  ~Copier();  // all work that was handed over is done first
  Copier(const Copier&) = delete;
  Copier& operator=(const Copier&) = delete;

  void hand_over(std::function<void()> work);
  void wait();  // until all work is done
  std::int64_t from_bytes() const { return from_bytes_; }

 private:
  void run();

  const std::int64_t from_bytes_;
  std::mutex mutex_;
  std::condition_variable more_, idle_;
  std::deque<std::function<void()>> queue_;
  bool busy_ = false;
  bool ends_ = false;
  std::thread thread_;
};

}  // namespace paci_rt
