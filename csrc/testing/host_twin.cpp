#include "testing/host_twin.hpp"

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <random>
#include <thread>
#include <utility>

#include "core/check.hpp"

namespace paci_rt {
namespace {

thread_local int current_device = -1;

}  // namespace

class HostTwin::Place {
 public:
  void reach() {
    const std::lock_guard<std::mutex> lock(mutex_);
    reached_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return reached_; });
  }
  bool reached() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return reached_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
};

class HostTwin::Worker {
 public:
  Worker(int device, std::int64_t max_delay_us, std::uint64_t seed)
      : device_(device), delay_us_(0, max_delay_us), random_(seed), thread_([this] { loop(); }) {}
  ~Worker() {
    stop();
    thread_.join();
  }

  int device() const { return device_; }

  void push(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    wake_.notify_one();
  }

  // After the work that is queued already.
  void stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    wake_.notify_one();
  }

  // The first exception since it was last asked for.
  std::exception_ptr take_error() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(error_, nullptr);
  }

 private:
  void loop() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      if (delay_us_.max() > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us_(random_)));
      try {
        work();
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  const int device_;
  std::uniform_int_distribution<std::int64_t> delay_us_;
  std::mt19937_64 random_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool stopping_ = false;
  std::exception_ptr error_;
  std::thread thread_;  // last: it uses all of the above
};

HostTwin::HostTwin(std::int64_t max_delay_us, std::uint64_t seed) : max_delay_us_(max_delay_us), seed_(seed) {
  check_value(max_delay_us >= 0 && max_delay_us <= 10'000'000, "max_delay_us=", max_delay_us,
              ": a delay is at least 0 microseconds and at most 10 seconds");
}

HostTwin::~HostTwin() {
  // All are told before one is waited for: they may wait for each other's events.
  for (auto& [handle, worker] : workers_) worker->stop();
}

void HostTwin::launch(Stream stream, std::function<void()> work) {
  const std::lock_guard<std::mutex> lock(mutex_);
  worker(stream).push(std::move(work));
}

void HostTwin::check_device(int device) {
  check_value(device >= 0, "device ", device, " has no streams: the host twin takes 0 and above");
}

HostTwin::Worker& HostTwin::worker(Stream stream) {
  const auto found = workers_.find(stream.handle);
  check_value(found != workers_.end(), "stream ", stream.handle, " does not belong to this host twin");
  check_value(found->second->device() == stream.device, "stream ", stream.handle, " is of device ",
              found->second->device(), ", and was passed for work on device ", stream.device);
  return *found->second;
}

HostTwin::EventEntry& HostTwin::event(int device, std::uintptr_t handle) {
  const auto found = events_.find(handle);
  check_value(found != events_.end(), "event ", handle, " does not belong to this host twin");
  check_value(found->second->device == device, "event ", handle, " is of device ", found->second->device,
              ", and was used on device ", device);
  return *found->second;
}

std::uintptr_t HostTwin::make_stream(int device, int) {
  check_device(device);
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::uintptr_t handle = next_handle_++;
  workers_.emplace(handle, std::make_unique<Worker>(device, max_delay_us_, seed_ + 7919 * handle));
  return handle;
}

void HostTwin::drop_stream(Stream stream) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = workers_.find(stream.handle);
  if (found == workers_.end()) return;
  found->second->stop();
  dropped_.push_back(std::move(found->second));
  workers_.erase(found);
}

void HostTwin::synchronize(Stream stream) {
  const auto end = std::make_shared<Place>();
  Worker* of = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    of = &worker(stream);
    of->push([end] { end->reach(); });
  }
  end->wait();
  if (const std::exception_ptr error = of->take_error()) std::rethrow_exception(error);
}

std::uintptr_t HostTwin::make_event(int device) {
  check_device(device);
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::uintptr_t handle = next_handle_++;
  events_.emplace(handle, std::make_shared<EventEntry>(EventEntry{device, nullptr, handle}));
  return handle;
}

void HostTwin::drop_event(int, std::uintptr_t handle) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = events_.find(handle);
  if (found == events_.end()) return;
  EventEntry& entry = *found->second;
  if (entry.owner == handle) {
    if (found->second.use_count() > 1) misuse_ += "an event went while another process had it open; ";
    entry.owner = 0;
  }
  events_.erase(found);
}

void HostTwin::record(std::uintptr_t handle, Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto place = std::make_shared<Place>();
  EventEntry& entry = event(stream.device, handle);
  worker(stream).push([place] { place->reach(); });
  entry.latest = place;
  ++records_;
}

void HostTwin::wait_event(Stream stream, std::uintptr_t handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = events_.find(handle);
  check_value(found != events_.end(), "event ", handle, " does not belong to this host twin");
  Worker& waiting = worker(stream);
  const std::int64_t number = ++waits_;
  if (lose_every_ > 0 && number % lose_every_ == 0) return;
  if (const auto place = found->second->latest) waiting.push([place] { place->wait(); });
}

bool HostTwin::event_done(int device, std::uintptr_t handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const EventEntry& entry = event(device, handle);
  return entry.latest == nullptr || entry.latest->reached();
}

void HostTwin::synchronize_event(int device, std::uintptr_t handle) {
  std::shared_ptr<Place> place;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    place = event(device, handle).latest;
  }
  if (place) place->wait();
}

void HostTwin::clear(Stream stream, void* address, std::size_t bytes) {
  launch(stream, [address, bytes] { std::memset(address, 0, bytes); });
}

void HostTwin::read(Stream stream, void* host, const void* address, std::size_t bytes) {
  launch(stream, [host, address, bytes] { std::memcpy(host, address, bytes); });
  synchronize(stream);
}

void HostTwin::copy(Stream stream, void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) launch(stream, [to, from, bytes] { std::memcpy(to, from, bytes); });
}

void* HostTwin::allocate(int device, std::size_t bytes) {
  check_device(device);
  void* address = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  if (address == nullptr) throw CudaError(concat("the host twin has no ", bytes, " bytes left"));
  ++allocated_;
  const std::lock_guard<std::mutex> lock(mutex_);
  sizes_[address] = bytes;
  return address;
}

void HostTwin::release(int, void* address) noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (opened_.count(address) != 0) misuse_ += "memory went while another process had it open; ";
    sizes_.erase(address);
  }
  std::free(address);
  --allocated_;
}

std::shared_ptr<void> HostTwin::enter(int device) {
  check_device(device);
  const int former = std::exchange(current_device, device);
  return {&current_device, [former](void*) { current_device = former; }};
}

int HostTwin::current() { return current_device; }

bool HostTwin::capturing(Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return capturing_.count(stream.handle) != 0;
}

void HostTwin::capture(Stream stream, bool on) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (on)
    capturing_.insert(stream.handle);
  else
    capturing_.erase(stream.handle);
}

std::string HostTwin::export_memory(int, void* address) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sizes_.find(address);
  check_value(found != sizes_.end(), "memory at ", address, " is not a whole allocation of this host twin");
  if (found->second % (std::size_t{2} << 20) != 0) misuse_ += "memory was shared that shares its block with other; ";
  return {reinterpret_cast<const char*>(&address), sizeof address};
}

void* HostTwin::open_memory(int, const std::string& handle) {
  void* address = nullptr;
  check_value(handle.size() == sizeof address, "a handle of ", handle.size(), " bytes is not one of the host twin's");
  std::memcpy(&address, handle.data(), sizeof address);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (sizes_.count(address) == 0) misuse_ += "a handle was opened whose memory had gone; ";
  opened_.insert(address);
  return address;
}

void HostTwin::close_memory(int, void* address) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = opened_.find(address);
  if (found != opened_.end())
    opened_.erase(found);
  else
    misuse_ += "memory was closed that was not open; ";
}

std::string HostTwin::misuse() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return misuse_;
}

std::uintptr_t HostTwin::make_shared_event(int device) { return make_event(device); }

std::string HostTwin::export_event(int device, std::uintptr_t handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  event(device, handle);
  return {reinterpret_cast<const char*>(&handle), sizeof handle};
}

std::uintptr_t HostTwin::open_event(int device, const std::string& text) {
  check_device(device);
  std::uintptr_t owners = 0;
  check_value(text.size() == sizeof owners, "a handle of ", text.size(), " bytes is not one of the host twin's");
  std::memcpy(&owners, text.data(), sizeof owners);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = events_.find(owners);
  check_value(found != events_.end(), "event ", owners, " does not belong to this host twin");
  const std::uintptr_t handle = next_handle_++;
  events_.emplace(handle, found->second);
  return handle;
}

}  // namespace paci_rt
