// What the rest of the core may know of CUDA: no CUDA header is included here, so a build without CUDA compiles too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/stream.hpp"

namespace paci_rt {

struct CudaInfo {
  int runtime_version = 0;        // of the CUDA runtime that is linked in, 13000 is 13.0; 0: no CUDA half
  std::vector<int> kernel_archs;  // compute capabilities that device code was compiled for, 90 is 9.0
};
CudaInfo cuda_info();  // touches no driver

struct CudaDevices {
  int count = 0;
  std::string reason;  // why there are none, in CUDA's words; empty where there are some
};
CudaDevices cuda_devices();  // starts the driver up, but makes no context

// Keeps `stream` busy for about so many microseconds; for tests and measurements of overlap. Throws
// std::invalid_argument where no device code was compiled.
void cuda_spin(Stream stream, std::int64_t microseconds);

// Sets `numel` floats at `address`, as a kernel does it.
void cuda_fill(Stream stream, std::uintptr_t address, std::int64_t numel, float value);

}  // namespace paci_rt
