#include "cuda/test_kernels.hpp"

namespace paci_rt {
namespace {

// globaltimer counts nanoseconds whatever the clock of the SMs does; its steps may be as long as a microsecond.
__device__ unsigned long long now_ns() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// Sleeps most of the time, so that what shares its SM loses next to nothing.
__device__ void stay(unsigned long long ns) {
  const unsigned long long start = now_ns();
  for (unsigned long long passed = 0; passed < ns; passed = now_ns() - start)
    __nanosleep(ns - passed > 4000 ? 1000 : 50);
}

__global__ void spin_kernel(unsigned long long ns) { stay(ns); }

// Blocks of half an SM's threads.
__global__ void __launch_bounds__(1024) mark_sms_kernel(std::int32_t* flags, unsigned long long ns) {
  unsigned sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  if (threadIdx.x == 0) flags[sm] = 1;
  stay(ns);
}

__global__ void fill_kernel(float* to, long long numel, float value) {
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += stride)
    to[i] = value;
}

}  // namespace

cudaError_t launch_spin(std::uintptr_t stream, std::int64_t microseconds) {
  const auto ns = static_cast<unsigned long long>(microseconds) * 1000;
  spin_kernel<<<1, 1, 0, reinterpret_cast<cudaStream_t>(stream)>>>(ns);
  return cudaGetLastError();
}

cudaError_t launch_mark_sms(std::uintptr_t stream, std::int32_t* flags, int blocks, std::int64_t microseconds) {
  const auto ns = static_cast<unsigned long long>(microseconds) * 1000;
  mark_sms_kernel<<<static_cast<unsigned>(blocks), 1024, 0, reinterpret_cast<cudaStream_t>(stream)>>>(flags, ns);
  return cudaGetLastError();
}

cudaError_t launch_fill(std::uintptr_t stream, float* to, std::int64_t numel, float value) {
  constexpr std::int64_t threads = 256, most_blocks = 1024;
  if (numel == 0) return cudaSuccess;
  const std::int64_t wanted = (numel + threads - 1) / threads;
  const auto blocks = static_cast<unsigned>(wanted < most_blocks ? wanted : most_blocks);
  fill_kernel<<<blocks, threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(to, numel, value);
  return cudaGetLastError();
}

}  // namespace paci_rt
