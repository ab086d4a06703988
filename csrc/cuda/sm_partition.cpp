#include "cuda/sm_partition.hpp"

#include <cstdio>
#include <string>

#include "cuda/cuda_check.hpp"
#include "cuda/test_kernels.hpp"

namespace paci_rt {

#if CUDA_VERSION < 12050

namespace {

[[noreturn]] void refuse() {
  throw std::invalid_argument(concat("the native core was built with the CUDA toolkit ", CUDA_VERSION / 1000, ".",
                                     CUDA_VERSION % 1000 / 10,
                                     ", and partitions of SMs need 12.5 or later: build it again with such a toolkit"));
}

}  // namespace

SmCounts sm_counts(int) { refuse(); }
int sm_groups(int, int) { refuse(); }
StreamHandle make_stream(const SmPartition&, int) { refuse(); }
SmSplit split_sms(int, int, int) { refuse(); }

#else

namespace {

template <typename Function>
Function entry(const char* name, int version) {
  void* found = driver_function(name, version);
  if (found == nullptr) {
    int driver = 0;
    PACI_RT_CUDA_CHECK(cudaDriverGetVersion(&driver));
    throw CudaError(concat("partitions of SMs need an NVIDIA driver for CUDA 12.5 or later, with ", name,
                           "; this one is for CUDA ", driver / 1000, ".", driver % 1000 / 10, ": update the driver"));
  }
  return reinterpret_cast<Function>(found);
}

struct Driver {
#define PACI_RT_ENTRY(member, name, version) decltype(&name) member = entry<decltype(&name)>(#name, version)
  PACI_RT_ENTRY(stream_create, cuGreenCtxStreamCreate, 12050);  // the latest one first: its error says the most
  PACI_RT_ENTRY(create, cuGreenCtxCreate, 12040);
  PACI_RT_ENTRY(destroy, cuGreenCtxDestroy, 12040);
  PACI_RT_ENTRY(resource, cuDeviceGetDevResource, 12040);
  PACI_RT_ENTRY(split, cuDevSmResourceSplitByCount, 12040);
  PACI_RT_ENTRY(describe, cuDevResourceGenerateDesc, 12040);
  PACI_RT_ENTRY(get_device, cuDeviceGet, 12000);
  PACI_RT_ENTRY(error_name, cuGetErrorName, 12000);
  PACI_RT_ENTRY(error_text, cuGetErrorString, 12000);
#undef PACI_RT_ENTRY
};

// A failure is not remembered: the next call tries again.
const Driver& driver() {
  static const Driver functions;
  return functions;
}

const char* remedy(CUresult status) {
  switch (status) {
    case CUDA_ERROR_NOT_SUPPORTED:
      return "; this GPU, or the mode that it is in, has no partitions of SMs: use ordinary streams";
    case CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION:
      return "; ask for fewer partitions or smaller ones";
    case CUDA_ERROR_OUT_OF_MEMORY:
      return "; free device memory";
    default:
      return "";
  }
}

std::string describe(CUresult status, int line, const char* call) {
  const char *name = "an unknown error", *text = "no text";
  (void)driver().error_name(status, &name);
  (void)driver().error_text(status, &text);
  return concat("sm_partition.cpp:", line, ": ", call, " failed with ", name, " (", static_cast<int>(status),
                "): ", text, remedy(status));
}

#define PACI_RT_DRIVER_CHECK(call)                                                                  \
  do {                                                                                              \
    const CUresult status_of_call = (call);                                                         \
    if (status_of_call != CUDA_SUCCESS) throw CudaError(describe(status_of_call, __LINE__, #call)); \
  } while (false)

CUdevice handle_of(int device) {
  CUdevice handle{};
  PACI_RT_DRIVER_CHECK(driver().get_device(&handle, device));
  return handle;
}

CUdevResource all_sms(int device) {
  CUdevResource all{};
  PACI_RT_DRIVER_CHECK(driver().resource(handle_of(device), &all, CU_DEV_RESOURCE_TYPE_SM));
  return all;
}

void destroy(CUgreenCtx context) noexcept {
  const CUresult status = driver().destroy(context);
  // While the process or the device's context goes away, all of it is freed anyway.
  if (status == CUDA_SUCCESS || status == CUDA_ERROR_DEINITIALIZED || status == CUDA_ERROR_CONTEXT_IS_DESTROYED) return;
  try {
    std::fprintf(stderr, "paci_rt: %s\n", describe(status, __LINE__, "cuGreenCtxDestroy").c_str());
  } catch (...) {  // no memory for the text
  }
}

SmPartition partition_of(int device, CUdevResource sms) {
  CUdevResourceDesc description = nullptr;
  PACI_RT_DRIVER_CHECK(driver().describe(&description, &sms, 1));
  CUgreenCtx context = nullptr;
  PACI_RT_DRIVER_CHECK(driver().create(&context, description, handle_of(device), CU_GREEN_CTX_DEFAULT_STREAM));
  return {device, static_cast<int>(sms.sm.smCount),
          std::shared_ptr<void>(context, [](void* held) { destroy(static_cast<CUgreenCtx>(held)); })};
}

// What CUDA's documentation of green contexts says, for drivers that do not say it themselves.
SmCounts documented(int device, int total) {
  int major = 0;
  PACI_RT_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major >= 9) return {total, 8, 8};
  return {total, major == 8 ? 4 : 2, 2};
}

}  // namespace

SmCounts sm_counts(int device) {
  check_gpu(device);
  const DeviceGuard guard(device);
  const CUdevResource all = all_sms(device);
  SmCounts counts = documented(device, static_cast<int>(all.sm.smCount));
#if CUDA_VERSION >= 13000
  if (all.sm.minSmPartitionSize > 0 && all.sm.smCoscheduledAlignment > 0) {
    counts.smallest = static_cast<int>(all.sm.minSmPartitionSize);
    counts.step = static_cast<int>(all.sm.smCoscheduledAlignment);
  }
#endif
  return counts;
}

int sm_groups(int device, int sms) {
  check_value(sms >= 1, "sms=", sms, ": a partition has at least 1 SM");
  check_gpu(device);
  const DeviceGuard guard(device);
  const CUdevResource all = all_sms(device);
  if (static_cast<unsigned>(sms) > all.sm.smCount) return 0;
  unsigned groups = 0;
  PACI_RT_DRIVER_CHECK(driver().split(nullptr, &groups, &all, nullptr, 0, static_cast<unsigned>(sms)));
  return static_cast<int>(groups);
}

StreamHandle make_stream(const SmPartition& partition, int priority) {
  const DeviceGuard guard(partition.device);
  CUstream made = nullptr;
  PACI_RT_DRIVER_CHECK(driver().stream_create(&made, static_cast<CUgreenCtx>(partition.context.get()),
                                              CU_STREAM_NON_BLOCKING, priority));
  // CUDA wants a green context's streams destroyed before it.
  return StreamHandle::adopt(ops_for(partition.device), {partition.device, reinterpret_cast<std::uintptr_t>(made)},
                             partition.context);
}

SmSplit split_sms(int device, int count, int sms) {
  check_value(count >= 1, "count=", count, ": ask for at least 1 partition");
  check_value(sms >= 1, "sms=", sms, ": a partition has at least 1 SM");
  check_gpu(device);
  // Green contexts hold the device's primary context: with this it is there before, and is not made for each of them.
  const DeviceGuard guard(device);
  const CUdevResource all = all_sms(device);
  check_value(static_cast<std::int64_t>(count) * sms <= all.sm.smCount, count, " partitions of ", sms,
              " SMs are more than the ", all.sm.smCount, " SMs of device ", device, ": ask for fewer or smaller ones");
  std::vector<CUdevResource> groups(static_cast<std::size_t>(count));
  CUdevResource rest{};
  auto made = static_cast<unsigned>(count);
  PACI_RT_DRIVER_CHECK(driver().split(groups.data(), &made, &all, &rest, 0, static_cast<unsigned>(sms)));
  check_value(made == static_cast<unsigned>(count), "device ", device, " gives ", made, " disjoint partitions of ", sms,
              " SMs, not ", count, ": ask for fewer or smaller ones");
  SmSplit split;
  for (const CUdevResource& group : groups) split.parts.push_back(partition_of(device, group));
  if (rest.type == CU_DEV_RESOURCE_TYPE_SM && rest.sm.smCount > 0) split.rest = partition_of(device, rest);
  return split;
}

#endif  // CUDA_VERSION

void mark_sms(Stream stream, std::uintptr_t flags, int blocks, std::int64_t microseconds) {
  check_value(blocks >= 1, "blocks=", blocks, ": at least 1");
  check_value(microseconds >= 0, "microseconds=", microseconds, ": at least 0");
  check_gpu(stream.device);
  const DeviceGuard guard(stream.device);
  PACI_RT_CUDA_CHECK(launch_mark_sms(stream.handle, reinterpret_cast<std::int32_t*>(flags), blocks, microseconds));
}

}  // namespace paci_rt
