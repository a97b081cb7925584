// SPDX-License-Identifier: Apache-2.0
// all_to_all_single through memory that the devices of a node share.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "process_group/group_registry.hpp"

namespace automoe {

/// The call, or null where it goes to NCCL: see Options.peer_all_to_all. Every
/// rank decides alike where all of them pass tensors of one size, on one kind
/// of device, and no split sizes. Collective at the first use of the group,
/// when both ways are tried if the options leave the choice open; `nccl` may be
/// null if they do not.
c10::intrusive_ptr<c10d::Work> tryPeerAllToAll(
    const RegisteredGroup& group,
    const at::Tensor& output,
    const at::Tensor& input,
    std::chrono::milliseconds timeout,
    c10d::Backend* nccl);

}  // namespace automoe
