// Where work runs, and the few operations on streams and events that the order of that work needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "core/check.hpp"

namespace paci_rt {

inline constexpr int kCpu = -1;

// A device and a stream of it, both plain integers across the language border. Borrowed: whoever made the stream keeps
// it alive until the buffers and events that it was given to have gone on to another stream.
struct Stream {
  int device = kCpu;          // -1 is the CPU, otherwise a CUDA ordinal
  std::uintptr_t handle = 0;  // cudaStream_t as an integer; 0 on the CPU

  // For the CPU's own kernels: anything else must be refused here, not deep in a kernel.
  void require_supported() const {
    check_value(device == kCpu, "device ", device,
                " was passed to a kernel that runs on the CPU: use paci_rt.kernels for tensors on a GPU, or device -1");
    check_value(handle == 0, "stream ", handle, " was passed for work on the CPU, which has no streams: pass stream=0");
  }
};

// Whether work on `a` and later work on `b` run in order without an event. Handle 2 is cudaStreamPerThread: another
// stream for every thread that says it.
inline bool same_queue(Stream a, Stream b) { return a.device == b.device && a.handle == b.handle && a.handle != 2; }

// What CUDA offers and what the host twin imitates. All handles belong to the object that made them. Nothing here waits
// on the calling thread but what says so. Errors throw; drop_* report them instead.
class StreamOps {
 public:
  StreamOps() = default;
  StreamOps(const StreamOps&) = delete;
  StreamOps& operator=(const StreamOps&) = delete;
  virtual ~StreamOps() = default;

  virtual void check_device(int device) = 0;  // throws unless work can run there

  virtual std::uintptr_t make_stream(int device, int priority) = 0;  // lower numbers go first
  virtual void drop_stream(Stream stream) noexcept = 0;              // work that was issued is still done
  virtual void synchronize(Stream stream) = 0;                       // waits for all its work

  virtual std::uintptr_t make_event(int device) = 0;
  virtual void drop_event(int device, std::uintptr_t event) noexcept = 0;
  virtual void record(std::uintptr_t event, Stream stream) = 0;          // replaces what it stood for
  virtual void wait_event(Stream stream, std::uintptr_t event) = 0;      // later work waits for the latest record
  virtual bool event_done(int device, std::uintptr_t event) = 0;         // true if it was never recorded
  virtual void synchronize_event(int device, std::uintptr_t event) = 0;  // waits

  virtual void clear(Stream stream, void* address, std::size_t bytes) = 0;
  virtual void read(Stream stream, void* host, const void* address, std::size_t bytes) = 0;  // waits
};

// The operations for a device: none for the CPU, where work is done by the time a call returns, else CUDA's. Throws
// std::invalid_argument where this build has no CUDA half.
std::shared_ptr<StreamOps> ops_for(int device);

// A stream that was made here, and goes with this object, or a borrowed one, which stays.
class StreamHandle {
 public:
  static StreamHandle make(std::shared_ptr<StreamOps> ops, int device, int priority = 0) {
    const std::uintptr_t handle = ops->make_stream(device, priority);
    return {std::move(ops), {device, handle}, true};
  }
  static StreamHandle borrow(std::shared_ptr<StreamOps> ops, Stream stream) { return {std::move(ops), stream, false}; }
  // One that was just made elsewhere, and is ours now; `keep` must outlive it.
  static StreamHandle adopt(std::shared_ptr<StreamOps> ops, Stream stream, std::shared_ptr<void> keep) {
    StreamHandle handle(std::move(ops), stream, true);
    handle.keep_ = std::move(keep);
    return handle;
  }

  StreamHandle(StreamHandle&& other) noexcept
      : keep_(std::move(other.keep_)),
        ops_(std::move(other.ops_)),
        stream_(other.stream_),
        owned_(std::exchange(other.owned_, false)) {}
  StreamHandle& operator=(StreamHandle&& other) noexcept {
    std::swap(keep_, other.keep_);
    std::swap(ops_, other.ops_);
    std::swap(stream_, other.stream_);
    std::swap(owned_, other.owned_);
    return *this;
  }
  ~StreamHandle() {
    if (owned_) ops_->drop_stream(stream_);
  }

  Stream get() const { return stream_; }
  bool owned() const { return owned_; }
  void synchronize() const { ops_->synchronize(stream_); }

 private:
  StreamHandle(std::shared_ptr<StreamOps> ops, Stream stream, bool owned)
      : ops_(std::move(ops)), stream_(stream), owned_(owned) {}

  std::shared_ptr<void> keep_;
  std::shared_ptr<StreamOps> ops_;
  Stream stream_;
  bool owned_;
};

}  // namespace paci_rt
