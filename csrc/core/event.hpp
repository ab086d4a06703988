// A point in the work of a stream that other streams, or the host, can wait for.
#pragma once

#include <utility>

#include "core/stream.hpp"

namespace paci_rt {

// Made here, and goes with this object, or borrowed, and stays. An event that was never recorded blocks nothing.
class Event {
 public:
  Event(std::shared_ptr<StreamOps> ops, int device)
      : ops_(std::move(ops)), device_(device), handle_(ops_->make_event(device)), owned_(true) {}
  static Event borrow(std::shared_ptr<StreamOps> ops, int device, std::uintptr_t handle) {
    return {std::move(ops), device, handle};
  }

  Event(Event&& other) noexcept
      : ops_(std::move(other.ops_)),
        device_(other.device_),
        handle_(other.handle_),
        owned_(std::exchange(other.owned_, false)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(ops_, other.ops_);
    std::swap(device_, other.device_);
    std::swap(handle_, other.handle_);
    std::swap(owned_, other.owned_);
    return *this;
  }
  ~Event() {
    if (owned_) ops_->drop_event(device_, handle_);
  }

  // Stands for all work on `stream` so far; what it stood for before is forgotten, except by those who wait already.
  void record(Stream stream) { ops_->record(handle_, stream); }
  // Work that is issued to `stream` from now on waits; the calling thread does not.
  void block(Stream stream) const { ops_->wait_event(stream, handle_); }
  bool done() const { return ops_->event_done(device_, handle_); }
  void synchronize() const { ops_->synchronize_event(device_, handle_); }

  int device() const { return device_; }
  std::uintptr_t handle() const { return handle_; }
  bool owned() const { return owned_; }

 private:
  Event(std::shared_ptr<StreamOps> ops, int device, std::uintptr_t handle)
      : ops_(std::move(ops)), device_(device), handle_(handle), owned_(false) {}

  std::shared_ptr<StreamOps> ops_;
  int device_;
  std::uintptr_t handle_;
  bool owned_;
};

}  // namespace paci_rt
