// Where work runs: a device and a stream of it, both plain integers across the language border.
#pragma once

#include <cstdint>

#include "check.hpp"

namespace paci_rt {

inline constexpr int kCpu = -1;

struct Stream {
  int device = kCpu;          // -1 is the CPU, otherwise a CUDA ordinal
  std::uintptr_t handle = 0;  // cudaStream_t as an integer; 0 on the CPU

  // This build has the CPU half only; anything else must be refused here, not deep in a kernel.
  void require_supported() const {
    check_value(device == kCpu, "device ", device,
                " needs the CUDA half of paci_rt, which this build does not have: use device -1 (the CPU)");
    check_value(handle == 0, "stream ", handle, " was passed for work on the CPU, which has no streams: pass stream=0");
  }
};

}  // namespace paci_rt
