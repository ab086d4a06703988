// NCCL on the host twin, for tests of the engine without a GPU: it moves bytes on the twin's worker threads and keeps
// NCCL's rules. A communicator's calls are first in, first out, in each direction; a call keeps its stream until it is
// matched; the first calls connect, for which both sides have to have made theirs; a lost peer is not reported; after
// an abort the streams of this side go on, without data.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "p2p/nccl_api.hpp"
#include "testing/host_twin.hpp"

namespace paci_rt {

class FakeNccl final : public NcclApi {
 public:
  FakeNccl(std::shared_ptr<HostTwin> twin, int version);
  ~FakeNccl() override;  // aborts what is left, so that the twin can end

  // What can go wrong, or differently. All of it may be changed at any time.
  void hold(bool on);                        // nothing is matched from now on, as if a link were down
  void break_all(int result);                // every communicator reports this result from now on
  void set_init_result(int result);          // of the next communicators
  void set_eager_bytes(std::int64_t bytes);  // sends up to this size end unmatched
  void set_background(int polls);            // calls are issued only when the state has been asked so many times

  // What tests look at.
  std::int64_t matched() const;     // transfers
  std::int64_t registered() const;  // buffers registered now
  std::int64_t alive() const;       // communicators neither destroyed nor aborted
  std::int64_t aborts() const;
  std::string misuse() const;            // rules that were broken; empty: none
  std::int64_t issuing_threads() const;  // the most that ever issued for one communicator

  std::string path() const override { return "the fake of the tests"; }
  int version() const override { return version_; }
  NcclResult unique_id(NcclUniqueId* id) override;
  NcclResult comm_init(NcclComm* comm, int ranks, const NcclUniqueId& id, int rank, int max_ctas) override;
  NcclResult comm_state(NcclComm comm, NcclResult* state) override;
  NcclResult comm_finalize(NcclComm comm) override;
  NcclResult comm_destroy(NcclComm comm) override;
  NcclResult comm_abort(NcclComm comm) override;
  NcclResult group_start() override;
  NcclResult group_end() override;
  NcclResult send(const void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) override;
  NcclResult recv(void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) override;
  NcclResult mem_alloc(void** buffer, std::size_t bytes) override;
  NcclResult mem_free(void* buffer) override;
  NcclResult comm_register(NcclComm comm, void* buffer, std::size_t bytes, void** handle) override;
  NcclResult comm_deregister(NcclComm comm, void* handle) override;
  std::string error_text(NcclResult result) const override;
  std::string last_error(NcclComm) const override { return {}; }

 private:
  struct Clique;
  struct Comm;
  struct Call;
  struct State;

  template <typename Work>
  auto locked(const Work& work) const;  // `work(state)` with the state's mutex held
  NcclResult queue(Call call);
  void check_current(int device, const char* call);  // with the state's mutex held; device -1: any
  static void run(const std::shared_ptr<State>& state, Comm* comm, std::vector<std::shared_ptr<Call>> calls);
  static void match(State& state, Clique& clique, int from, int to);
  void launch(Comm* comm, Stream stream, const std::vector<std::shared_ptr<Call>>& calls);
  bool is_registered(const Comm* comm, const void* buffer) const;

  const std::shared_ptr<HostTwin> twin_;
  const int version_;
  std::shared_ptr<State> state_;  // outlives this object in the twin's queues
};

}  // namespace paci_rt
