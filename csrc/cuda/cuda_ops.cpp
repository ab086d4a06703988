#include "cuda/cuda_ops.hpp"

#include <cstdio>
#include <cstring>
#include <string>

#include "core/device_ops.hpp"
#include "cuda/cuda_check.hpp"
#include "cuda/test_kernels.hpp"

namespace paci_rt {
namespace {

cudaStream_t native(Stream stream) { return reinterpret_cast<cudaStream_t>(stream.handle); }
cudaEvent_t native(std::uintptr_t event) { return reinterpret_cast<cudaEvent_t>(event); }

class CudaOps final : public DeviceOps {
 public:
  void check_device(int device) override {
    const CudaDevices found = cuda_devices();
    if (found.count == 0) throw CudaError(concat("device ", device, " is not usable: ", found.reason));
    check_value(device >= 0 && device < found.count, "device ", device, " does not exist: CUDA sees ", found.count,
                ", from 0 to ", found.count - 1);
  }

  std::uintptr_t make_stream(int device, int priority) override {
    check_device(device);
    const DeviceGuard guard(device);
    cudaStream_t made = nullptr;
    // Non-blocking: an implicit order with the legacy default stream would hide a missing event, and cost overlap.
    PACI_RT_CUDA_CHECK(cudaStreamCreateWithPriority(&made, cudaStreamNonBlocking, priority));
    return reinterpret_cast<std::uintptr_t>(made);
  }

  void drop_stream(Stream stream) noexcept override {
    guarded(stream.device, [&] { PACI_RT_CUDA_REPORT(cudaStreamDestroy(native(stream))); });
  }

  void synchronize(Stream stream) override {
    const DeviceGuard guard(stream.device);
    PACI_RT_CUDA_CHECK(cudaStreamSynchronize(native(stream)));
  }

  std::uintptr_t make_event(int device) override {
    const DeviceGuard guard(device);
    cudaEvent_t made = nullptr;
    PACI_RT_CUDA_CHECK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    return reinterpret_cast<std::uintptr_t>(made);
  }

  void drop_event(int device, std::uintptr_t event) noexcept override {
    guarded(device, [&] { PACI_RT_CUDA_REPORT(cudaEventDestroy(native(event))); });
  }

  void record(std::uintptr_t event, Stream stream) override {
    const DeviceGuard guard(stream.device);
    PACI_RT_CUDA_CHECK(cudaEventRecord(native(event), native(stream)));
  }

  void wait_event(Stream stream, std::uintptr_t event) override {
    const DeviceGuard guard(stream.device);
    PACI_RT_CUDA_CHECK(cudaStreamWaitEvent(native(stream), native(event), 0));
  }

  bool event_done(int device, std::uintptr_t event) override {
    const DeviceGuard guard(device);
    const cudaError_t status = cudaEventQuery(native(event));
    if (status == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    PACI_RT_CUDA_CHECK(status);
    return true;
  }

  void synchronize_event(int device, std::uintptr_t event) override {
    const DeviceGuard guard(device);
    PACI_RT_CUDA_CHECK(cudaEventSynchronize(native(event)));
  }

  void clear(Stream stream, void* address, std::size_t bytes) override {
    const DeviceGuard guard(stream.device);
    PACI_RT_CUDA_CHECK(cudaMemsetAsync(address, 0, bytes, native(stream)));
  }

  void read(Stream stream, void* host, const void* address, std::size_t bytes) override {
    const DeviceGuard guard(stream.device);
    PACI_RT_CUDA_CHECK(cudaMemcpyAsync(host, address, bytes, cudaMemcpyDeviceToHost, native(stream)));
    PACI_RT_CUDA_CHECK(cudaStreamSynchronize(native(stream)));
  }

  void copy(Stream stream, void* to, const void* from, std::size_t bytes) override {
    if (bytes == 0) return;
    const DeviceGuard guard(stream.device);
    // Addresses are unified: the driver sees which devices they are on.
    PACI_RT_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, native(stream)));
  }

  void* allocate(int device, std::size_t bytes) override {
    const DeviceGuard guard(device);
    void* address = nullptr;
    PACI_RT_CUDA_CHECK(cudaMalloc(&address, bytes));
    return address;
  }

  void release(int device, void* address) noexcept override {
    guarded(device, [&] { PACI_RT_CUDA_REPORT(cudaFree(address)); });
  }

  std::shared_ptr<void> enter(int device) override { return std::make_shared<DeviceGuard>(device); }

  void leave_captures_alone() noexcept override {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    PACI_RT_CUDA_REPORT(cudaThreadExchangeStreamCaptureMode(&mode));
  }

  bool capturing(Stream stream) override {
    const DeviceGuard guard(stream.device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    PACI_RT_CUDA_CHECK(cudaStreamIsCapturing(native(stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }

  int multiprocessors(int device) override {
    int count = 0;
    PACI_RT_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }

  std::string export_memory(int device, void* address) override {
    const DeviceGuard guard(device);
    cudaIpcMemHandle_t handle;
    PACI_RT_CUDA_CHECK(cudaIpcGetMemHandle(&handle, address));
    return {reinterpret_cast<const char*>(&handle), sizeof handle};
  }

  void* open_memory(int device, const std::string& text) override {
    const DeviceGuard guard(device);
    const auto handle = handle_of<cudaIpcMemHandle_t>(text);
    void* address = nullptr;
    PACI_RT_CUDA_CHECK(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess));
    return address;
  }

  void close_memory(int device, void* address) noexcept override {
    guarded(device, [&] { PACI_RT_CUDA_REPORT(cudaIpcCloseMemHandle(address)); });
  }

  std::uintptr_t make_shared_event(int device) override {
    const DeviceGuard guard(device);
    cudaEvent_t made = nullptr;
    PACI_RT_CUDA_CHECK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming | cudaEventInterprocess));
    return reinterpret_cast<std::uintptr_t>(made);
  }

  std::string export_event(int device, std::uintptr_t event) override {
    const DeviceGuard guard(device);
    cudaIpcEventHandle_t handle;
    PACI_RT_CUDA_CHECK(cudaIpcGetEventHandle(&handle, native(event)));
    return {reinterpret_cast<const char*>(&handle), sizeof handle};
  }

  std::uintptr_t open_event(int device, const std::string& text) override {
    const DeviceGuard guard(device);
    const auto handle = handle_of<cudaIpcEventHandle_t>(text);
    cudaEvent_t opened = nullptr;
    PACI_RT_CUDA_CHECK(cudaIpcOpenEventHandle(&opened, handle));
    return reinterpret_cast<std::uintptr_t>(opened);
  }

 private:
  template <typename Handle>
  static Handle handle_of(const std::string& text) {
    Handle handle;
    check_value(text.size() == sizeof handle, "a handle of ", text.size(), " bytes is not one of CUDA's, which has ",
                sizeof handle);
    std::memcpy(&handle, text.data(), sizeof handle);
    return handle;
  }

  template <typename Work>
  static void guarded(int device, const Work& work) noexcept {
    try {
      const DeviceGuard guard(device);
      work();
    } catch (const CudaError& error) {
      std::fprintf(stderr, "paci_rt: %s\n", error.what());
    } catch (...) {
    }
  }
};

}  // namespace

std::shared_ptr<DeviceOps> device_ops_for(int device) {
  check_value(device != kCpu, "device -1 (the CPU) has neither streams nor events: name a GPU, from 0");
  // Never destroyed, since streams that outlive the module's other statics still need it.
  static const auto* const ops = new std::shared_ptr<DeviceOps>(std::make_shared<CudaOps>());
  return *ops;
}

std::shared_ptr<StreamOps> ops_for(int device) { return device == kCpu ? nullptr : device_ops_for(device); }

CudaInfo cuda_info() {
#if defined(PACI_RT_CUDA_ARCHS)
  return {CUDART_VERSION, {PACI_RT_CUDA_ARCHS}};
#else
  return {CUDART_VERSION, {}};
#endif
}

CudaDevices cuda_devices() {
  CudaDevices found;
  const cudaError_t status = cudaGetDeviceCount(&found.count);
  if (status == cudaSuccess && found.count > 0) return found;
  found.count = 0;
  found.reason = status == cudaSuccess ? "CUDA found no device"
                                       : concat("cudaGetDeviceCount says ", cudaGetErrorName(status), " (",
                                                static_cast<int>(status), "): ", cudaGetErrorString(status));
  found.reason += "; install or update NVIDIA's driver so that nvidia-smi lists a GPU, or use the CPU";
  (void)cudaGetLastError();
  return found;
}

void cuda_spin(Stream stream, std::int64_t microseconds) {
  check_value(microseconds >= 0, "microseconds=", microseconds, ": at least 0");
  check_gpu(stream.device);
  const DeviceGuard guard(stream.device);
  PACI_RT_CUDA_CHECK(launch_spin(stream.handle, microseconds));
}

void cuda_fill(Stream stream, std::uintptr_t address, std::int64_t numel, float value) {
  check_value(numel >= 0, "numel=", numel, ": at least 0");
  check_gpu(stream.device);
  const DeviceGuard guard(stream.device);
  PACI_RT_CUDA_CHECK(launch_fill(stream.handle, reinterpret_cast<float*>(address), numel, value));
}

}  // namespace paci_rt
