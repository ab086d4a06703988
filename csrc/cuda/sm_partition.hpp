// Disjoint groups of a GPU's multiprocessors (SMs), each with streams whose work runs there and nowhere else: what CUDA
// calls green contexts. No CUDA header is included here, so a build without CUDA compiles too.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/stream.hpp"

namespace paci_rt {

struct SmCounts {
  int total = 0;     // SMs of the GPU
  int smallest = 0;  // that a partition may have
  int step = 0;      // the number of SMs of a partition is a multiple of it
};
SmCounts sm_counts(int device);

// How many disjoint partitions of at least `sms` SMs each the GPU allows: fewer than a division says where its
// multiprocessors come in uneven clusters.
int sm_groups(int device, int sms);

struct SmPartition {
  int device = kCpu;
  int sms = 0;
  std::shared_ptr<void> context;  // the green context: goes with the last partition or stream that needs it
};

// A stream whose kernels run on the partition, whatever context is current. It goes with its owner.
StreamHandle make_stream(const SmPartition& partition, int priority);

struct SmSplit {
  std::vector<SmPartition> parts;
  std::optional<SmPartition> rest;  // the SMs that no part has, if there are any
};

// Exactly `count` partitions of `sms` SMs each, rounded up by the driver. Throws std::invalid_argument where the GPU
// gives fewer, CudaError where driver or GPU know no partitions.
SmSplit split_sms(int device, int count, int sms);

// Sets flags[i] to 1 for every SM i that one of `blocks` thread blocks ran on, each of which stays for about so many
// microseconds and leaves room for one other on its SM at most. For tests.
void mark_sms(Stream stream, std::uintptr_t flags, int blocks, std::int64_t microseconds);

}  // namespace paci_rt
