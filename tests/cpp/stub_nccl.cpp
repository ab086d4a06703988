// A library that looks like NCCL from outside, for tests of the loader: it checks what it is handed over against the
// documented API. STUB_VERSION is the version it claims; STUB_WITHOUT_FINALIZE leaves a function out.
#include <climits>
#include <cstddef>
#include <cstring>

extern "C" {

struct UniqueId {
  char internal[128];
};

// As NCCL 2.17 to 2.24 have it.
struct Config {
  size_t size;
  unsigned int magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char* net_name;
  int split_share;
};

static const char* last_error = "";

int ncclGetVersion(int* version) {
  *version = STUB_VERSION;
  return 0;
}

int ncclGetUniqueId(UniqueId* id) {
  std::memset(id->internal, 7, sizeof id->internal);
  return 0;
}

int ncclCommInitRankConfig(void** comm, int ranks, UniqueId id, int rank, Config* config) {
  const auto fail = [](const char* why) {
    last_error = why;
    return 4;
  };
  if (ranks != 1 || rank != 0) return fail("ranks");
  for (const char byte : id.internal)
    if (byte != 7) return fail("unique id");
  // Later versions have a field in what is padding here, so it must be there, and undefined.
  int later = 0;
  std::memcpy(&later, reinterpret_cast<const char*>(config) + 44, sizeof later);
  if (config->size != 48 || config->magic != 0xcafebeefU || config->version != 21800) return fail("header");
  if (config->blocking != 0 || config->split_share != 0) return fail("blocking or splitShare");
  if (config->cga_cluster_size != INT_MIN || config->min_ctas != INT_MIN || config->max_ctas != INT_MIN ||
      config->net_name != nullptr || later != INT_MIN)
    return fail("undefined fields");
  last_error = "Cuda failure 'no device'";
  *comm = nullptr;
  return 1;  // ncclUnhandledCudaError, as without a GPU
}

int ncclCommGetAsyncError(void*, int* state) { return *state = 0; }
#ifndef STUB_WITHOUT_FINALIZE
int ncclCommFinalize(void*) { return 0; }
#endif
int ncclCommDestroy(void*) { return 0; }
int ncclCommAbort(void*) { return 0; }
int ncclGroupStart() { return 0; }
int ncclGroupEnd() { return 0; }
int ncclSend(const void*, size_t, int, int, void*, void*) { return 0; }
int ncclRecv(void*, size_t, int, int, void*, void*) { return 0; }
#if STUB_VERSION >= 21900
int ncclMemAlloc(void**, size_t) { return 0; }
int ncclMemFree(void*) { return 0; }
int ncclCommRegister(void*, void*, size_t, void**) { return 0; }
int ncclCommDeregister(void*, void*) { return 0; }
#endif
const char* ncclGetErrorString(int) { return "unhandled cuda error"; }
const char* ncclGetLastError(void*) { return last_error; }
}
