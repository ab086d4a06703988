// NCCL without its headers and without linking it: the library is found at run time, and what it can do follows from
// its version. The few types that cross the border are declared here, from the documented API; their layout has been
// stable since 2.18, the oldest version that works.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "core/stream.hpp"

namespace paci_rt {

// A call of NCCL that failed, or a library that is not there; reaches Python as paci_rt.errors.NcclError.
class NcclError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// ncclResult_t. Values that later versions add are passed through as they are.
enum class NcclResult : int {
  success = 0,
  unhandled_cuda_error = 1,
  system_error = 2,
  internal_error = 3,
  invalid_argument = 4,
  invalid_usage = 5,
  remote_error = 6,
  in_progress = 7,
};

using NcclComm = void*;

struct NcclUniqueId {
  static constexpr std::size_t kBytes = 128;
  char internal[kBytes] = {};
};

// What a version can do; every field says from which one on.
struct NcclFeatures {
  bool split_share = false;     // 2.18: communicators that share nothing
  bool mem_alloc = false;       // 2.19: ncclMemAlloc, ncclCommRegister
  bool registered_p2p = false;  // 2.23: registered buffers make send and receive copy nothing on the way
  bool launch_order = false;    // 2.26: NCCL_LAUNCH_ORDER_IMPLICIT
  bool multi_rank_gpu = false;  // 2.30: NCCL_MULTI_RANK_GPU_ENABLE
};
NcclFeatures nccl_features(int version);

inline constexpr int kOldestNccl = 21800;
std::string nccl_version_text(int version);  // 22703 is "2.27.3"

// The dozen calls that the engine makes. All communicators are nonblocking: nothing here waits for another rank, and
// `in_progress` is an answer that the caller has to ask about again.
class NcclApi {
 public:
  NcclApi() = default;
  NcclApi(const NcclApi&) = delete;
  NcclApi& operator=(const NcclApi&) = delete;
  virtual ~NcclApi() = default;

  virtual std::string path() const = 0;
  virtual int version() const = 0;
  NcclFeatures features() const { return nccl_features(version()); }

  virtual NcclResult unique_id(NcclUniqueId* id) = 0;
  // At most `max_ctas` thread blocks a transfer; 0 leaves it to NCCL. The device must be current.
  virtual NcclResult comm_init(NcclComm* comm, int ranks, const NcclUniqueId& id, int rank, int max_ctas) = 0;
  virtual NcclResult comm_state(NcclComm comm, NcclResult* state) = 0;  // ncclCommGetAsyncError
  virtual NcclResult comm_finalize(NcclComm comm) = 0;
  virtual NcclResult comm_destroy(NcclComm comm) = 0;
  virtual NcclResult comm_abort(NcclComm comm) = 0;

  virtual NcclResult group_start() = 0;
  virtual NcclResult group_end() = 0;
  virtual NcclResult send(const void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) = 0;
  virtual NcclResult recv(void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) = 0;

  // `invalid_usage` where the version has no such call.
  virtual NcclResult mem_alloc(void** buffer, std::size_t bytes) = 0;
  virtual NcclResult mem_free(void* buffer) = 0;
  virtual NcclResult comm_register(NcclComm comm, void* buffer, std::size_t bytes, void** handle) = 0;
  virtual NcclResult comm_deregister(NcclComm comm, void* handle) = 0;

  virtual std::string error_text(NcclResult result) const = 0;
  virtual std::string last_error(NcclComm comm) const = 0;

  // Throws NcclError with the call, NCCL's name, number and text, and the remedy where one is known.
  void check(NcclResult result, const char* call, NcclComm comm = nullptr) const;
};

// The library called `name` that this process has loaded already, else the first of `candidates` (paths or names) that
// loads. Throws NcclError where there is none, or one that is too old. The library is never unloaded.
std::shared_ptr<NcclApi> load_nccl(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace paci_rt
