// Lanes over NCCL: one communicator of two ranks for each channel, since a communicator does one thing after another.
#pragma once

#include <memory>

#include "p2p/ipc_lane.hpp"
#include "p2p/lane.hpp"
#include "p2p/nccl_communicator.hpp"

namespace paci_rt {

// Transfers within one GPU and process: NCCL demands that both halves are in one group.
std::unique_ptr<Mover> make_nccl_mover(std::shared_ptr<NcclApi> api, const LaneOptions& options,
                                       const NcclLaneOptions& nccl);

std::unique_ptr<SendLane> make_nccl_sender(std::shared_ptr<NcclApi> api, const LaneOptions& options,
                                           const NcclLaneOptions& nccl);
std::unique_ptr<RecvLane> make_nccl_receiver(std::shared_ptr<NcclApi> api, const LaneOptions& options,
                                             const NcclLaneOptions& nccl);

}  // namespace paci_rt
