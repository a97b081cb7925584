// SPDX-License-Identifier: Apache-2.0
// all_reduce of sparse tensors: everybody gets all entries and adds them up.
#include <ATen/ATen.h>

#include <utility>

#include "process_group/coalesced_work.hpp"
#include "process_group/process_group_automoe.hpp"

namespace automoe {
namespace {

using Tensors = std::vector<at::Tensor>;

// Entries of every rank are padded to the longest list.
at::Tensor padded(const at::Tensor& tensor, int dimension, int64_t entries) {
  auto sizes = tensor.sizes().vec();
  sizes[static_cast<size_t>(dimension)] = entries;
  at::Tensor result = at::zeros(sizes, tensor.options());
  result.narrow(dimension, 0, tensor.size(dimension)).copy_(tensor);
  return result;
}

Tensors likeOn(const at::Tensor& tensor, int ranks) {
  Tensors copies;
  for (int rank = 0; rank < ranks; ++rank) {
    copies.push_back(at::empty_like(tensor));
  }
  return copies;
}

}  // namespace

c10::intrusive_ptr<c10d::Work> ProcessGroupAutoMoe::allreduce_sparse(
    Tensors& tensors, const c10d::AllreduceOptions& options) {
  TORCH_CHECK_VALUE(
      tensors.size() == 1 && tensors.front().layout() == at::kSparse,
      "all_reduce: expected one sparse COO tensor");
  TORCH_CHECK_VALUE(
      options.reduceOp == c10d::ReduceOp::SUM,
      "all_reduce: only SUM is defined for sparse tensors");
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor own = tensors.front().coalesce();
  const c10d::AllgatherOptions gather{options.timeout};
  const auto everybody = [&](const at::Tensor& mine) {
    TensorLists outputs = {likeOn(mine, size_)};
    Tensors inputs = {mine};
    allgather(outputs, inputs, gather)->wait();
    return outputs.front();
  };
  // The shape: sizes, how many of them are sparse, and entries.
  auto numbers = own.sizes().vec();
  numbers.push_back(own.sparse_dim());
  numbers.push_back(own._nnz());
  const at::Tensor shape = at::tensor(numbers, at::kLong);
  const Tensors shapes = everybody(shape);
  const int64_t last = shape.numel() - 1;
  int64_t most = 0;
  for (int rank = 0; rank < size_; ++rank) {
    const at::Tensor& theirs = shapes[static_cast<size_t>(rank)];
    TORCH_CHECK_VALUE(
        theirs.narrow(0, 0, last).equal(shape.narrow(0, 0, last)),
        "all_reduce: the sparse tensor of rank ",
        rank,
        " has another shape than that of rank ",
        rank_);
    most = std::max(most, theirs[last].item<int64_t>());
  }
  const Tensors indices = everybody(padded(own._indices(), 1, most));
  const Tensors values = everybody(padded(own._values(), 0, most));
  Tensors ownIndices;
  Tensors ownValues;
  for (size_t rank = 0; rank < shapes.size(); ++rank) {
    const auto entries = shapes[rank][last].item<int64_t>();
    ownIndices.push_back(indices[rank].narrow(1, 0, entries));
    ownValues.push_back(values[rank].narrow(0, 0, entries));
  }
  const at::Tensor sum = at::sparse_coo_tensor(
                             at::cat(ownIndices, 1),
                             at::cat(ownValues, 0),
                             own.sizes(),
                             own.options())
                             .coalesce();
  tensors.front().copy_(sum);
  return c10::make_intrusive<CoalescedWork>(
      rank_, std::vector<c10::intrusive_ptr<Work>>());
}

}  // namespace automoe
