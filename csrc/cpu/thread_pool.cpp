#include "cpu/thread_pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace paci_rt {
namespace {

constexpr int kMostThreads = 1024;

// One parallel_for in progress. Shared with the workers, so that one that wakes late finds it still alive and done.
struct Job {
  const std::function<void(std::int64_t)>* body;
  std::int64_t tasks;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> done{0};

  // Returns whether this call finished the last task.
  bool work() {
    bool last = false;
    for (std::int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) {
      (*body)(i);
      last = done.fetch_add(1) + 1 == tasks;
    }
    return last;
  }
};

class Pool {
 public:
  // One job at a time: a second caller does its own work alone, which gives the same result.
  bool try_run(const std::shared_ptr<Job>& job, int helpers) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    while (workers_ < helpers && add_worker()) {
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      helpers_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    if (!job->work()) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, [&] { return job->done.load() == job->tasks; });
    }
    std::lock_guard<std::mutex> lock(mutex_);
    job_.reset();
    return true;
  }

 private:
  // Where the system has no thread to give, those there are do the work.
  bool add_worker() {
    try {
      std::thread([this, index = workers_] { loop(index); }).detach();
    } catch (const std::system_error&) {
      return false;
    }
    ++workers_;
    return true;
  }

  void loop(int index) {
    std::uint64_t seen = 0;
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index < helpers_) job = job_;
      }
      if (job && job->work()) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable finished_;
  std::shared_ptr<Job> job_;
  int helpers_ = 0;
  int workers_ = 0;
  std::uint64_t generation_ = 0;
};

// Workers do not survive fork(), and must not be joined while the process unloads: the pool of each process is made on
// first use and never destroyed.
Pool& pool() {
  static std::mutex mutex;
  static Pool* instance = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (instance == nullptr || owner != getpid()) {
    instance = new Pool;
    owner = getpid();
  }
  return *instance;
}

}  // namespace

void parallel_for(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& body) {
  const int helpers = static_cast<int>(std::min<std::int64_t>(std::min(threads, kMostThreads), tasks)) - 1;
  if (helpers > 0) {
    auto job = std::make_shared<Job>();
    job->body = &body;
    job->tasks = tasks;
    if (pool().try_run(job, helpers)) return;
  }
  for (std::int64_t i = 0; i < tasks; ++i) body(i);
}

}  // namespace paci_rt
