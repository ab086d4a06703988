// The only device code of the core: three small kernels for tests and measurements. Arithmetic on the GPU is Triton's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace paci_rt {

// Launch on the current device, and return what the launch said. Where nvcc was not there to compile the kernels they
// throw std::invalid_argument.
cudaError_t launch_spin(std::uintptr_t stream, std::int64_t microseconds);
cudaError_t launch_fill(std::uintptr_t stream, float* to, std::int64_t numel, float value);
cudaError_t launch_mark_sms(std::uintptr_t stream, std::int32_t* flags, int blocks, std::int64_t microseconds);

}  // namespace paci_rt
