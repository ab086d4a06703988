#include "p2p/nccl_communicator.hpp"

#include <sched.h>

#include <cstdio>

namespace paci_rt {
namespace {

constexpr double kFinishS = 5.0;  // how long a communicator may take to end in peace

}  // namespace

NcclCommunicator::NcclCommunicator(std::shared_ptr<NcclApi> api, const LaneOptions& options)
    : api_(std::move(api)), options_(options) {}

void NcclCommunicator::begin(int ranks, int rank, const NcclLaneOptions& options) {
  const std::shared_ptr<void> current = options_.ops->enter(options_.device);
  NcclComm made = nullptr;
  const NcclResult result = api_->comm_init(&made, ranks, options.id, rank, options.max_ctas);
  comm_ = made;
  if (result != NcclResult::in_progress) api_->check(result, "ncclCommInitRankConfig");
}

bool NcclCommunicator::ended(const char* call) {
  const NcclComm comm = need();
  NcclResult state = NcclResult::success;
  api_->check(api_->comm_state(comm, &state), "ncclCommGetAsyncError", comm);
  if (state == NcclResult::in_progress) return false;
  api_->check(state, call, comm);
  return true;
}

bool NcclCommunicator::connected() { return ended("ncclCommInitRankConfig"); }
bool NcclCommunicator::settled() { return ended("ncclGroupEnd"); }

NcclComm NcclCommunicator::need() const {
  const NcclComm comm = comm_;
  if (comm == nullptr) throw NcclError("this communicator was aborted, or was never made: make a new transport");
  return comm;
}

// NCCL puts back the device that it found, which makes a context on device 0 where the calling thread had none.
std::shared_ptr<void> NcclCommunicator::enter() const noexcept {
  try {
    return options_.ops->enter(options_.device);
  } catch (const std::exception& error) {  // the device has failed: what follows says so too
    std::fprintf(stderr, "paci_rt: %s\n", error.what());
    return nullptr;
  }
}

void NcclCommunicator::start(const Calls& calls) {
  const NcclComm comm = need();
  const std::shared_ptr<void> current = options_.ops->enter(options_.device);
  api_->check(api_->group_start(), "ncclGroupStart", comm);
  try {
    calls(*api_, comm);
  } catch (...) {
    (void)api_->group_end();  // the error that counts is on its way
    throw;
  }
  const NcclResult result = api_->group_end();
  if (result != NcclResult::in_progress) api_->check(result, "ncclGroupEnd", comm);
}

// Nothing may be put on the stream before the calls are really there.
void NcclCommunicator::issue(const Calls& calls) {
  start(calls);
  const std::int64_t end = now_ns() + ns_of(options_.timeout_s);
  while (!settled()) {
    if (options_.stop->load()) throw NcclError("ncclGroupEnd was given up, since the transport failed elsewhere");
    if (now_ns() > end)
      throw NcclError(concat("ncclGroupEnd was still in progress after ", options_.timeout_s,
                             " s (transfer_timeout_s): NCCL_DEBUG=INFO says what it waits for"));
    sched_yield();
  }
}

bool NcclCommunicator::wait_settled(NcclComm comm, double seconds) noexcept {
  const std::int64_t end = now_ns() + ns_of(seconds);
  NcclResult state = NcclResult::in_progress;
  while (now_ns() < end) {
    if (api_->comm_state(comm, &state) != NcclResult::success) return false;
    if (state != NcclResult::in_progress) return state == NcclResult::success;
    sched_yield();
  }
  return false;
}

std::string NcclCommunicator::trouble() {
  const NcclComm comm = comm_;
  if (comm == nullptr) return {};
  NcclResult state = NcclResult::success;
  const NcclResult asked = api_->comm_state(comm, &state);
  const NcclResult found = asked != NcclResult::success ? asked : state;
  if (found == NcclResult::success || found == NcclResult::in_progress) return {};
  const std::string last = api_->last_error(comm);
  return concat("NCCL reports ", api_->error_text(found), last.empty() ? "" : ": ", last);
}

void NcclCommunicator::abort() noexcept {
  const NcclComm comm = comm_.exchange(nullptr);
  if (comm == nullptr) return;
  const std::shared_ptr<void> current = enter();
  handles_.clear();  // they went with it
  const NcclResult result = api_->comm_abort(comm);
  if (result != NcclResult::success && result != NcclResult::in_progress)
    std::fprintf(stderr, "paci_rt: ncclCommAbort failed with %d\n", static_cast<int>(result));
}

void NcclCommunicator::finish() noexcept {
  const NcclComm comm = comm_;
  if (comm == nullptr) return;
  const std::shared_ptr<void> current = enter();
  for (const auto& [address, handle] : handles_) (void)api_->comm_deregister(comm, handle);
  handles_.clear();
  const NcclResult result = api_->comm_finalize(comm);
  finishing_ = result == NcclResult::success || result == NcclResult::in_progress;
}

void NcclCommunicator::close() noexcept {
  const NcclComm comm = comm_;
  if (comm == nullptr) return;
  if (!finishing_ || !wait_settled(comm, kFinishS)) return abort();
  const std::shared_ptr<void> current = enter();
  comm_ = nullptr;
  (void)api_->comm_destroy(comm);
}

void* NcclCommunicator::allocate_registered(std::int64_t bytes) {
  const NcclComm comm = need();
  const std::shared_ptr<void> current = options_.ops->enter(options_.device);
  void* address = nullptr;
  void* handle = nullptr;
  const auto size = static_cast<std::size_t>(bytes);
  api_->check(api_->mem_alloc(&address, size), "ncclMemAlloc", comm);
  const NcclResult result = api_->comm_register(comm, address, size, &handle);
  if (result != NcclResult::success) {
    (void)api_->mem_free(address);
    api_->check(result, "ncclCommRegister (register_buffers=False does without)", comm);
  }
  handles_[address] = handle;
  return address;
}

void NcclCommunicator::release_registered(void* address) noexcept {
  const NcclComm comm = comm_;
  const std::shared_ptr<void> current = enter();
  const auto found = handles_.find(address);
  if (found != handles_.end()) {
    if (comm != nullptr) (void)api_->comm_deregister(comm, found->second);
    handles_.erase(found);
  }
  (void)api_->mem_free(address);
}

}  // namespace paci_rt
