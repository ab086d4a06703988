// What point-to-point transfers need of a device beyond the order of streams: memory, copies, and the handles by which
// another process reaches both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/stream.hpp"

namespace paci_rt {

class DeviceOps : public StreamOps {
 public:
  // Work on the device's memory, between devices too. `bytes` may be 0.
  virtual void copy(Stream stream, void* to, const void* from, std::size_t bytes) = 0;

  virtual void* allocate(int device, std::size_t bytes) = 0;
  virtual void release(int device, void* address) noexcept = 0;  // after all work on it is done

  // Makes the device current for libraries that look at it, until the last copy of what is returned has gone.
  virtual std::shared_ptr<void> enter(int device) = 0;
  // For a thread that works beside those of the program: its calls neither become part of CUDA graphs that others
  // record nor break them.
  virtual void leave_captures_alone() noexcept {}
  virtual bool capturing(Stream stream) = 0;  // whether a CUDA graph is being recorded on it
  virtual int multiprocessors(int device) = 0;

  // Memory of `allocate` and events of `make_shared_event`, for other processes of this host. What is opened must be
  // closed before the owner gives it back.
  virtual std::string export_memory(int device, void* address) = 0;
  virtual void* open_memory(int device, const std::string& handle) = 0;
  virtual void close_memory(int device, void* address) noexcept = 0;
  virtual std::uintptr_t make_shared_event(int device) = 0;  // goes by drop_event, as opened ones do
  virtual std::string export_event(int device, std::uintptr_t event) = 0;
  virtual std::uintptr_t open_event(int device, const std::string& handle) = 0;
};

// All that is a StreamOps in this core is a DeviceOps too. Throws std::invalid_argument for the CPU and where this
// build has no CUDA half.
std::shared_ptr<DeviceOps> device_ops_for(int device);

}  // namespace paci_rt
