// A communicator of NCCL and the memory that is registered for it.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "p2p/lane.hpp"
#include "p2p/nccl_api.hpp"

namespace paci_rt {

struct NcclLaneOptions {
  NcclUniqueId id;
  int max_ctas = 4;               // thread blocks of a transfer; 0 leaves it to NCCL
  bool register_buffers = false;  // staging in memory that NCCL reaches without copies of its own
};

// A communicator of this process, nonblocking, with what is registered for it.
class NcclCommunicator {
 public:
  NcclCommunicator(std::shared_ptr<NcclApi> api, const LaneOptions& options);
  ~NcclCommunicator() { abort(); }

  void begin(int ranks, int rank, const NcclLaneOptions& options);
  bool connected();  // throws NcclError
  using Calls = std::function<void(NcclApi&, NcclComm)>;
  // One group of calls. The first ones connect, which takes the other side's: `settled` says when they are issued.
  void start(const Calls& calls);
  bool settled();
  void issue(const Calls& calls);  // issued when this returns, which does not wait for the other side once connected
  std::string trouble();
  void abort() noexcept;
  void finish() noexcept;
  void close() noexcept;  // in peace where `finish` began it and the other side does the same, else by an abort

  void* allocate_registered(std::int64_t bytes);
  void release_registered(void* address) noexcept;

  NcclApi& api() { return *api_; }

 private:
  NcclComm need() const;
  bool ended(const char* call);                  // whether what `call` began is done; throws NcclError
  std::shared_ptr<void> enter() const noexcept;  // makes the device current, until what is returned has gone
  bool wait_settled(NcclComm comm, double seconds) noexcept;

  const std::shared_ptr<NcclApi> api_;
  const LaneOptions options_;
  std::atomic<NcclComm> comm_{nullptr};
  bool finishing_ = false;
  std::map<void*, void*> handles_;  // of registered memory
};

}  // namespace paci_rt
