// The tensor description of DLPack (https://dmlc.github.io/dlpack), version 0 of its ABI, which every torch takes: the
// way for memory that the core owns to become a torch tensor, without torch's headers.
#pragma once

#include <cstdint>
#include <memory>

#include "core/stream.hpp"
#include "p2p/channel.hpp"

namespace paci_rt {

struct DLTensor {
  void* data;
  std::int32_t device_type;  // 1 CPU, 2 CUDA
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t dtype_code;
  std::uint8_t dtype_bits;
  std::uint16_t dtype_lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // null: contiguous
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};

// One tensor of an arrived message; the message's lease lives as long as it. The owner of the result must call its
// deleter, on whatever thread.
inline DLManagedTensor* to_dlpack(const Arrival& arrival, std::size_t at, int device) {
  struct Manager {
    DLManagedTensor managed;
    std::shared_ptr<const Layout> layout;
    std::shared_ptr<void> lease;
  };
  const TensorMeta& meta = arrival.layout->tensors[at];
  const DTypeInfo& dtype = dtype_info(meta.dtype);
  auto* manager = new Manager{{}, arrival.layout, arrival.lease};
  DLTensor& tensor = manager->managed.tensor;
  tensor.data = meta.bytes() == 0 ? nullptr : reinterpret_cast<void*>(arrival.address + arrival.layout->offsets[at]);
  tensor.device_type = device == kCpu ? 1 : 2;
  tensor.device_id = device == kCpu ? 0 : device;
  tensor.ndim = static_cast<std::int32_t>(meta.shape.size());
  tensor.dtype_code = dtype.code;
  tensor.dtype_bits = dtype.bits;
  tensor.dtype_lanes = 1;
  tensor.shape = const_cast<std::int64_t*>(meta.shape.data());  // never written
  manager->managed.manager = manager;
  manager->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Manager*>(self->manager); };
  return &manager->managed;
}

}  // namespace paci_rt
