#include "p2p/nccl_api.hpp"

#include <dlfcn.h>

#include <climits>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace paci_rt {
namespace {

// ncclConfig_t as of 2.17, and the field that 2.25 put where the compiler pads. A library reads as many bytes as `size`
// says and ignores fields newer than `version`, but not all versions ignore what lies in the padding: it says
// "undefined" too.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeefU;
  unsigned int version = kOldestNccl;
  int blocking = INT_MIN;
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
  int traffic_class = INT_MIN;
};
static_assert(sizeof(Config) == 48 && offsetof(Config, net_name) == 32 && offsetof(Config, split_share) == 40,
              "NCCL's layout of 64-bit systems");

constexpr int kChar = 0;  // ncclInt8: counts are bytes

const char* name_of(NcclResult result) {
  constexpr const char* names[] = {"ncclSuccess",       "ncclUnhandledCudaError", "ncclSystemError",
                                   "ncclInternalError", "ncclInvalidArgument",    "ncclInvalidUsage",
                                   "ncclRemoteError",   "ncclInProgress"};
  const auto at = static_cast<std::size_t>(result);  // a negative one is large
  return at < std::size(names) ? names[at] : "an error that this version of paci_rt does not know";
}

const char* remedy(NcclResult result) {
  switch (result) {
    case NcclResult::unhandled_cuda_error:
      return "no GPU is usable here, or CUDA failed earlier: see that nvidia-smi lists a GPU and that NVIDIA's driver "
             "is not older than NCCL's CUDA, or use another transport";
    case NcclResult::system_error:
      return "see that the hosts reach each other (NCCL_SOCKET_IFNAME names the interface) and that /dev/shm has room";
    case NcclResult::invalid_usage:
      return "two ranks may be on one GPU: give each rank its own (LOCAL_RANK), or set NCCL_MULTI_RANK_GPU_ENABLE=1 "
             "with NCCL 2.30 or later";
    case NcclResult::remote_error:
      return "another rank failed or was ended: its own message has the cause";
    default:
      return "NCCL_DEBUG=INFO makes it say more";
  }
}

class LoadedNccl final : public NcclApi {
 public:
  LoadedNccl(void* library, std::string path) : library_(library), path_(std::move(path)) {
    find(get_version_, "ncclGetVersion");
    check(NcclResult{get_version_(&version_)}, "ncclGetVersion");
    if (version_ < kOldestNccl)
      throw NcclError(concat("NCCL ", nccl_version_text(version_), " (", path_, ") is too old: from ",
                             nccl_version_text(kOldestNccl), " on it works; pip install -U nvidia-nccl-cu12 or -cu13"));
    find(unique_id_, "ncclGetUniqueId");
    find(comm_init_, "ncclCommInitRankConfig");
    find(comm_state_, "ncclCommGetAsyncError");
    find(comm_finalize_, "ncclCommFinalize");
    find(comm_destroy_, "ncclCommDestroy");
    find(comm_abort_, "ncclCommAbort");
    find(group_start_, "ncclGroupStart");
    find(group_end_, "ncclGroupEnd");
    find(send_, "ncclSend");
    find(recv_, "ncclRecv");
    find(error_text_, "ncclGetErrorString");
    find(last_error_, "ncclGetLastError");
    if (!features().mem_alloc) return;
    find(mem_alloc_, "ncclMemAlloc");
    find(mem_free_, "ncclMemFree");
    find(comm_register_, "ncclCommRegister");
    find(comm_deregister_, "ncclCommDeregister");
  }

  std::string path() const override { return path_; }
  int version() const override { return version_; }
  NcclResult unique_id(NcclUniqueId* id) override { return NcclResult{unique_id_(id)}; }

  NcclResult comm_init(NcclComm* comm, int ranks, const NcclUniqueId& id, int rank, int max_ctas) override {
    Config config;
    config.blocking = 0;
    config.split_share = 0;
    if (max_ctas > 0) config.max_ctas = max_ctas;
    return NcclResult{comm_init_(comm, ranks, id, rank, &config)};
  }
  NcclResult comm_state(NcclComm comm, NcclResult* state) override {
    int found = 0;
    const NcclResult result{comm_state_(comm, &found)};
    *state = NcclResult{found};
    return result;
  }
  NcclResult comm_finalize(NcclComm comm) override { return NcclResult{comm_finalize_(comm)}; }
  NcclResult comm_destroy(NcclComm comm) override { return NcclResult{comm_destroy_(comm)}; }
  NcclResult comm_abort(NcclComm comm) override { return NcclResult{comm_abort_(comm)}; }

  NcclResult group_start() override { return NcclResult{group_start_()}; }
  NcclResult group_end() override { return NcclResult{group_end_()}; }
  NcclResult send(const void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) override {
    return NcclResult{send_(buffer, bytes, kChar, peer, comm, reinterpret_cast<void*>(stream.handle))};
  }
  NcclResult recv(void* buffer, std::size_t bytes, int peer, NcclComm comm, Stream stream) override {
    return NcclResult{recv_(buffer, bytes, kChar, peer, comm, reinterpret_cast<void*>(stream.handle))};
  }

  NcclResult mem_alloc(void** buffer, std::size_t bytes) override {
    return mem_alloc_ == nullptr ? NcclResult::invalid_usage : NcclResult{mem_alloc_(buffer, bytes)};
  }
  NcclResult mem_free(void* buffer) override {
    return mem_free_ == nullptr ? NcclResult::invalid_usage : NcclResult{mem_free_(buffer)};
  }
  NcclResult comm_register(NcclComm comm, void* buffer, std::size_t bytes, void** handle) override {
    return comm_register_ == nullptr ? NcclResult::invalid_usage
                                     : NcclResult{comm_register_(comm, buffer, bytes, handle)};
  }
  NcclResult comm_deregister(NcclComm comm, void* handle) override {
    return comm_deregister_ == nullptr ? NcclResult::invalid_usage : NcclResult{comm_deregister_(comm, handle)};
  }

  std::string error_text(NcclResult result) const override {
    return error_text_ == nullptr ? "" : error_text_(static_cast<int>(result));
  }
  std::string last_error(NcclComm comm) const override {
    const char* text = last_error_ == nullptr ? nullptr : last_error_(comm);
    return text == nullptr ? "" : text;
  }

 private:
  template <typename Function>
  void find(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(dlsym(library_, name));
    if (function == nullptr)
      throw NcclError(concat(path_, " has no function ", name,
                             ", so paci_rt cannot use it: pip install nvidia-nccl-cu12 or -cu13"));
  }

  void* library_;
  std::string path_;
  int version_ = 0;
  int (*get_version_)(int*) = nullptr;
  int (*unique_id_)(NcclUniqueId*) = nullptr;
  int (*comm_init_)(NcclComm*, int, NcclUniqueId, int, Config*) = nullptr;
  int (*comm_state_)(NcclComm, int*) = nullptr;
  int (*comm_finalize_)(NcclComm) = nullptr;
  int (*comm_destroy_)(NcclComm) = nullptr;
  int (*comm_abort_)(NcclComm) = nullptr;
  int (*group_start_)() = nullptr;
  int (*group_end_)() = nullptr;
  int (*send_)(const void*, std::size_t, int, int, NcclComm, void*) = nullptr;
  int (*recv_)(void*, std::size_t, int, int, NcclComm, void*) = nullptr;
  int (*mem_alloc_)(void**, std::size_t) = nullptr;
  int (*mem_free_)(void*) = nullptr;
  int (*comm_register_)(NcclComm, void*, std::size_t, void**) = nullptr;
  int (*comm_deregister_)(NcclComm, void*) = nullptr;
  const char* (*error_text_)(int) = nullptr;
  const char* (*last_error_)(NcclComm) = nullptr;
};

// Where a library lies that was found by its name alone.
std::string path_of(void* library, const std::string& asked) {
  Dl_info info{};
  void* symbol = dlsym(library, "ncclGetVersion");
  if (symbol != nullptr && dladdr(symbol, &info) != 0 && info.dli_fname != nullptr) return info.dli_fname;
  return asked;
}

}  // namespace

NcclFeatures nccl_features(int version) {
  return {version >= 21800, version >= 21900, version >= 22300, version >= 22600, version >= 23000};
}

std::string nccl_version_text(int version) {
  return concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

void NcclApi::check(NcclResult result, const char* call, NcclComm comm) const {
  if (result == NcclResult::success) return;
  const std::string text = error_text(result), last = last_error(comm);
  throw NcclError(concat(call, " failed with ", name_of(result), " (", static_cast<int>(result), ")",
                         text.empty() ? "" : ": ", text, last.empty() ? "" : "; ", last, "; ", remedy(result)));
}

std::shared_ptr<NcclApi> load_nccl(const std::string& name, const std::vector<std::string>& candidates) {
  // Two of them in one process would each make threads and connections of their own.
  if (void* loaded = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD))
    return std::make_shared<LoadedNccl>(loaded, path_of(loaded, name));
  std::string tried;
  for (const std::string& candidate : candidates) {
    if (void* library = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL))
      return std::make_shared<LoadedNccl>(library, path_of(library, candidate));
    const char* why = dlerror();
    tried += concat("; ", candidate, ": ", why == nullptr ? "not loadable" : why);
  }
  throw NcclError(concat("no NCCL was found: this process has not loaded ", name, tried,
                         "; it comes with torch's CUDA builds, or pip install nvidia-nccl-cu12 or -cu13"));
}

}  // namespace paci_rt
