// Lanes whose sender puts the message into the receiver's slot itself, while the receiver's device does nothing:
// between processes of one host through CUDA's handles for other processes, within a process by address.
#pragma once

#include <memory>
#include <string>

#include "p2p/lane.hpp"

namespace paci_rt {

// How the bytes get there.
class Mover {
 public:
  Mover() = default;
  Mover(const Mover&) = delete;
  Mover& operator=(const Mover&) = delete;
  virtual ~Mover() = default;

  virtual std::string name() const = 0;
  virtual void begin() {}
  virtual bool connected() { return true; }
  // To `slot` and, tensor by tensor, the layout's offsets in it.
  virtual void move(Stream stream, const Transfer& transfer, void* slot) = 0;
  virtual std::string trouble() { return {}; }
  virtual void abort() noexcept {}
  virtual void finish() noexcept {}
  virtual void close() noexcept {}
};

// cudaMemcpyAsync: by a copy engine between devices.
std::unique_ptr<Mover> make_copy_mover(std::shared_ptr<DeviceOps> ops);

enum class Reach { process, host };  // whether the other side is in this process or in another one of this host

std::unique_ptr<SendLane> make_push_sender(const LaneOptions& options, Reach reach, std::unique_ptr<Mover> mover);
// `mover` names the sender's.
std::unique_ptr<RecvLane> make_push_receiver(const LaneOptions& options, Reach reach, std::string mover);

}  // namespace paci_rt
