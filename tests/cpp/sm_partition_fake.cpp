// csrc/cuda/sm_partition.cpp against a fake of NVIDIA's driver: what it asks for, what it makes of the answers, and in
// which order it gives things back. Prints what the driver was told; tests/test_green.py knows what that should be.
//
//   sm_partition_fake split COUNT SMS | counts | groups SMS | stale-driver | failing-create
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "cuda/cuda_ops.hpp"
#include "cuda/sm_partition.hpp"
#include "cuda/test_kernels.hpp"

namespace {

// A GPU whose 132 SMs come in clusters of uneven size: 15 groups of 8 fit, and 7 of 16.
constexpr unsigned kClusters[] = {18, 18, 18, 18, 16, 16, 16, 12};
constexpr unsigned kTotal = 132, kStep = 8;

int driver_version = 13000;
int creates_that_succeed = 1 << 20;
CUcontext current = nullptr;
std::uintptr_t last_handle = 0;

template <typename Handle>
Handle fresh() {
  return reinterpret_cast<Handle>(++last_handle);
}

unsigned number(const void* handle) { return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(handle)); }

unsigned rounded(unsigned sms) { return (sms + kStep - 1) / kStep * kStep; }

CUdevResource of_sms(unsigned count) {
  CUdevResource resource{};
  resource.type = count == 0 ? CU_DEV_RESOURCE_TYPE_INVALID : CU_DEV_RESOURCE_TYPE_SM;
  resource.sm.smCount = count;
  return resource;
}

CUresult fake_resource(CUdevice, CUdevResource* resource, CUdevResourceType) {
  *resource = of_sms(kTotal);
#if CUDA_VERSION >= 13000
  resource->sm.minSmPartitionSize = resource->sm.smCoscheduledAlignment = kStep;
#endif
  return CUDA_SUCCESS;
}

CUresult fake_split(CUdevResource* result, unsigned* groups, const CUdevResource* input, CUdevResource* remaining,
                    unsigned flags, unsigned sms) {
  if (flags != 0 || sms > input->sm.smCount) return CUDA_ERROR_INVALID_VALUE;
  unsigned fit = 0;
  for (const unsigned cluster : kClusters) fit += cluster / rounded(sms);
  if (result == nullptr) {
    *groups = fit;
    return CUDA_SUCCESS;
  }
  if (*groups > fit) *groups = fit;
  for (unsigned at = 0; at < *groups; ++at) result[at] = of_sms(rounded(sms));
  if (remaining != nullptr) *remaining = of_sms(kTotal - *groups * rounded(sms));
  return CUDA_SUCCESS;
}

CUresult fake_describe(CUdevResourceDesc* description, CUdevResource* resources, unsigned count) {
  if (count != 1) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
  *description = reinterpret_cast<CUdevResourceDesc>(static_cast<std::uintptr_t>(resources[0].sm.smCount));
  return CUDA_SUCCESS;
}

CUresult fake_create(CUgreenCtx* context, CUdevResourceDesc description, CUdevice device, unsigned flags) {
  if (creates_that_succeed-- == 0) return CUDA_ERROR_NOT_SUPPORTED;
  *context = fresh<CUgreenCtx>();
  std::printf("create %u: %u SMs of device %d, flags %u, context %s\n", number(*context), number(description), device,
              flags, current == nullptr ? "none" : "primary");
  return CUDA_SUCCESS;
}

CUresult fake_destroy(CUgreenCtx context) {
  std::printf("destroy %u\n", number(context));
  return CUDA_SUCCESS;
}

CUresult fake_stream_create(CUstream* stream, CUgreenCtx context, unsigned flags, int priority) {
  *stream = fresh<CUstream>();
  std::printf("stream %u of %u, flags %u, priority %d\n", number(*stream), number(context), flags, priority);
  return CUDA_SUCCESS;
}

CUresult fake_get_device(CUdevice* handle, int ordinal) {
  *handle = ordinal + 40;  // handles and ordinals are not the same thing
  return CUDA_SUCCESS;
}

CUresult fake_error_name(CUresult, const char** name) {
  *name = "CUDA_ERROR_OF_THE_FAKE";
  return CUDA_SUCCESS;
}

CUresult fake_error_text(CUresult, const char** text) {
  *text = "text of the fake";
  return CUDA_SUCCESS;
}

CUresult fake_get_current(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult fake_set_current(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

struct Known {
  const char* name;
  int since;
  void* function;
};

template <typename Function>
Known known(const char* name, int since, Function function) {
  return {name, since, reinterpret_cast<void*>(function)};
}

}  // namespace

// --- the runtime, as far as sm_partition.cpp and cuda_check.cpp call it ---

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  static const Known all[] = {known("cuDeviceGetDevResource", 12040, fake_resource),
                              known("cuDevSmResourceSplitByCount", 12040, fake_split),
                              known("cuDevResourceGenerateDesc", 12040, fake_describe),
                              known("cuGreenCtxCreate", 12040, fake_create),
                              known("cuGreenCtxDestroy", 12040, fake_destroy),
                              known("cuGreenCtxStreamCreate", 12050, fake_stream_create),
                              known("cuDeviceGet", 2000, fake_get_device),
                              known("cuGetErrorName", 6000, fake_error_name),
                              known("cuGetErrorString", 6000, fake_error_text),
                              known("cuCtxGetCurrent", 4000, fake_get_current),
                              known("cuCtxSetCurrent", 4000, fake_set_current)};
  *function = nullptr;
  *result = cudaDriverEntryPointSymbolNotFound;
  for (const Known& one : all) {
    if (std::strcmp(one.name, name) != 0) continue;
    const bool asked = static_cast<int>(version) >= one.since, has = driver_version >= one.since;
    *result = asked && has ? cudaDriverEntryPointSuccess : cudaDriverEntryPointVersionNotSufficent;
    if (asked && has) *function = one.function;
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  std::printf("set device %d\n", device);
  current = fresh<CUcontext>();
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "?"; }
const char* cudaGetErrorString(cudaError_t) { return "?"; }

}  // extern "C"

namespace paci_rt {
namespace {

// Only what partitions and the streams of theirs need.
class FakeOps final : public StreamOps {
 public:
  void check_device(int device) override { check_value(device == 0, "device ", device, " does not exist"); }
  std::uintptr_t make_stream(int, int) override { return 0; }
  void drop_stream(Stream stream) noexcept override {
    std::printf("drop stream %u\n", static_cast<unsigned>(stream.handle));
  }
  void synchronize(Stream) override {}
  std::uintptr_t make_event(int) override { return 0; }
  void drop_event(int, std::uintptr_t) noexcept override {}
  void record(std::uintptr_t, Stream) override {}
  void wait_event(Stream, std::uintptr_t) override {}
  bool event_done(int, std::uintptr_t) override { return true; }
  void synchronize_event(int, std::uintptr_t) override {}
  void clear(Stream, void*, std::size_t) override {}
  void read(Stream, void*, const void*, std::size_t) override {}
};

}  // namespace

std::shared_ptr<StreamOps> ops_for(int) {
  static const auto ops = std::make_shared<FakeOps>();
  return ops;
}

cudaError_t launch_mark_sms(std::uintptr_t, std::int32_t*, int, std::int64_t) { return cudaSuccess; }

}  // namespace paci_rt

namespace {

// Partitions go before a stream that came from one of them, and streams are moved about.
void split(int count, int sms) {
  paci_rt::SmSplit parts = paci_rt::split_sms(0, count, sms);
  for (const paci_rt::SmPartition& part : parts.parts) std::printf("part of %d\n", part.sms);
  std::printf("rest of %d\n", parts.rest ? parts.rest->sms : 0);
  paci_rt::StreamHandle first = paci_rt::make_stream(parts.parts.front(), -1);
  paci_rt::StreamHandle moved = std::move(first);
  parts = {};
  std::printf("partitions are gone\n");
  paci_rt::StreamHandle second = paci_rt::make_stream(paci_rt::split_sms(0, 1, sms).parts.front(), 0);
  moved = std::move(second);
  std::printf("end\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const auto argument = [&](int at) { return at < argc ? std::atoi(argv[at]) : 0; };
  try {
    if (what == "split") {
      split(argument(2), argument(3));
    } else if (what == "counts") {
      const paci_rt::SmCounts counts = paci_rt::sm_counts(0);
      std::printf("%d %d %d\n", counts.total, counts.smallest, counts.step);
    } else if (what == "groups") {
      std::printf("%d\n", paci_rt::sm_groups(0, argument(2)));
    } else if (what == "stale-driver") {
      driver_version = 12040;
      paci_rt::sm_counts(0);
    } else if (what == "failing-create") {
      creates_that_succeed = 2;
      paci_rt::split_sms(0, 4, 8);
    } else {
      return 2;
    }
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
  return 0;
}
