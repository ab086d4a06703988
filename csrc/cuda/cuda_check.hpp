// Checked calls of the CUDA runtime, and the current device. Included by the CUDA half only.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/check.hpp"

namespace paci_rt {

// Throws CudaError with file, line, call, CUDA's name and text of the error, and the remedy where one is known.
void throw_cuda_error(cudaError_t status, const char* file, int line, const char* call);

// The same on stderr, for destructors. Silent while the process or the context is going away: all is freed anyway.
void report_cuda_error(cudaError_t status, const char* file, int line, const char* call) noexcept;

#define PACI_RT_CUDA_CHECK(call)                                                                               \
  do {                                                                                                         \
    const cudaError_t status_of_call = (call);                                                                 \
    if (status_of_call != cudaSuccess) ::paci_rt::throw_cuda_error(status_of_call, __FILE__, __LINE__, #call); \
  } while (false)

#define PACI_RT_CUDA_REPORT(call) ::paci_rt::report_cuda_error((call), __FILE__, __LINE__, #call)

// A function of the driver, which the runtime has loaded; the module itself does not link it, so that it loads without
// one. `version` is that of the CUDA whose driver was the first to have the function. Null: this driver has none.
void* driver_function(const char* name, int version);

// Throws unless `device` is a GPU that work can run on; -1, the CPU, is none.
void check_gpu(int device);

// Makes a device current for a scope. The context that was current comes back, also where there was none: setting the
// former device by its number instead would create a context on device 0, and take its memory, where the thread had not
// used any yet.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext former_ = nullptr;
  bool changed_ = false;
};

}  // namespace paci_rt
