#include "cuda/cuda_check.hpp"

#include <cstdio>
#include <cstring>
#include <string>

#include "core/stream.hpp"

namespace paci_rt {
namespace {

const char* remedy(cudaError_t status) {
  switch (status) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInitializationError:
      return "no GPU is usable here: install or update NVIDIA's driver so that nvidia-smi lists one, or use the CPU";
    case cudaErrorInvalidDevice:
      return "use a device number below that of CUDA's visible devices";
    case cudaErrorInvalidResourceHandle:
      return "the stream or event is of another device, or its owner has destroyed it: keep it alive, on its device";
    case cudaErrorMemoryAllocation:
      return "free device memory";
    case cudaErrorNoKernelImageForDevice:
      return "the core was built for other GPUs: build it again where this one is";
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorStreamCaptureImplicit:
      return "a CUDA graph is being captured: seal, consume, release and wait outside of captures";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
      return "an earlier kernel failed: run with CUDA_LAUNCH_BLOCKING=1 to see which";
    default:
      return "";
  }
}

std::string describe(cudaError_t status, const char* file, int line, const char* call) {
  const char* slash = std::strrchr(file, '/');  // without the folder it was built in
  const char* what_to_do = remedy(status);
  return concat(slash == nullptr ? file : slash + 1, ":", line, ": ", call, " failed with ", cudaGetErrorName(status),
                " (", static_cast<int>(status), "): ", cudaGetErrorString(status), *what_to_do == '\0' ? "" : "; ",
                what_to_do);
}

template <typename Function>
Function need(const char* name) {
  void* found = driver_function(name, 12000);
  if (found == nullptr)
    throw CudaError(concat("NVIDIA's driver has no function ", name, ": update it to one for CUDA 12 or later"));
  return reinterpret_cast<Function>(found);
}

struct Driver {
  CUresult (*get_context)(CUcontext*) = need<CUresult (*)(CUcontext*)>("cuCtxGetCurrent");
  CUresult (*set_context)(CUcontext) = need<CUresult (*)(CUcontext)>("cuCtxSetCurrent");
};

// A failure is not remembered: the next call tries again.
const Driver& driver() {
  static const Driver functions;
  return functions;
}

}  // namespace

void throw_cuda_error(cudaError_t status, const char* file, int line, const char* call) {
  (void)cudaGetLastError();  // said once; an error that does not heal comes back by itself
  throw CudaError(describe(status, file, line, call));
}

void report_cuda_error(cudaError_t status, const char* file, int line, const char* call) noexcept {
  if (status == cudaSuccess || status == cudaErrorCudartUnloading || status == cudaErrorContextIsDestroyed) return;
  (void)cudaGetLastError();
  try {
    std::fprintf(stderr, "paci_rt: %s\n", describe(status, file, line, call).c_str());
  } catch (...) {  // no memory for the text
  }
}

void* driver_function(const char* name, int version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  PACI_RT_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result));
#else
  (void)version;
  PACI_RT_CUDA_CHECK(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result));
#endif
  return result == cudaDriverEntryPointSuccess ? found : nullptr;
}

void check_gpu(int device) {
  check_value(device != kCpu, "device -1 (the CPU) has neither streams nor SMs: name a GPU, from 0");
  ops_for(device)->check_device(device);
}

DeviceGuard::DeviceGuard(int device) {
  if (driver().get_context(&former_) != CUDA_SUCCESS) former_ = nullptr;
  int current = -1;
  if (former_ != nullptr) PACI_RT_CUDA_CHECK(cudaGetDevice(&current));
  if (current == device) return;
  PACI_RT_CUDA_CHECK(cudaSetDevice(device));
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_ && driver().set_context(former_) != CUDA_SUCCESS)
    std::fprintf(stderr, "paci_rt: the CUDA context that was current before could not be made current again\n");
}

}  // namespace paci_rt
