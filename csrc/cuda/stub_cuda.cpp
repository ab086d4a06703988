// Stands in for the CUDA half where it was not built: the same functions, each of which says so.
#include "core/device_ops.hpp"
#include "cuda/cuda_ops.hpp"
#include "cuda/sm_partition.hpp"

namespace paci_rt {
namespace {

[[noreturn]] void refuse(int device) {
  throw std::invalid_argument(
      concat("device ", device, " needs the CUDA half of paci_rt, which this build does not have (", PACI_RT_NO_CUDA,
             "): build it again with PACI_RT_CUDA=on where the CUDA toolkit is, ", "or use device -1 (the CPU)"));
}

}  // namespace

std::shared_ptr<StreamOps> ops_for(int device) {
  if (device != kCpu) refuse(device);
  return nullptr;
}

std::shared_ptr<DeviceOps> device_ops_for(int device) {
  check_value(device != kCpu, "device -1 (the CPU) has neither streams nor events: name a GPU, from 0");
  refuse(device);
}

CudaInfo cuda_info() { return {}; }
CudaDevices cuda_devices() { return {0, "the native core was built without CUDA (" PACI_RT_NO_CUDA ")"}; }
void cuda_spin(Stream stream, std::int64_t) { refuse(stream.device); }
void cuda_fill(Stream stream, std::uintptr_t, std::int64_t, float) { refuse(stream.device); }

SmCounts sm_counts(int device) { refuse(device); }
int sm_groups(int device, int) { refuse(device); }
StreamHandle make_stream(const SmPartition& partition, int) { refuse(partition.device); }
SmSplit split_sms(int device, int, int) { refuse(device); }
void mark_sms(Stream stream, std::uintptr_t, int, std::int64_t) { refuse(stream.device); }

}  // namespace paci_rt
