// SPDX-License-Identifier: Apache-2.0
// The schemas of torch.ops.automoe. Nothing is mutated, no output shares
// memory with an input. Routes are always on the CPU; the other tensors of a
// call are on one device: the CPU, a CUDA device, or one of another kind, whose
// tensors are staged through the host.
//
// T tokens of this rank, K experts per token, E experts of the group,
// e experts of this rank, P ranks, R receive rows, S send rows (one per token
// and node it goes to), H elements of a row. "sum type": float64 for float64
// rows, else float32. A missing optional gives an empty output of shape (0,).
// Errors are ValueError for arguments, DistBackendError for communication.
#include <torch/library.h>

#include <vector>

#include "moe_ops/device_operators.hpp"
#include "moe_ops/operators.hpp"

TORCH_LIBRARY(automoe, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  // Collective over the group. topk_ids: (T, K) int32 or int64, -1 = none;
  // max_recv_tokens: -1, or exactly R; reduction_map: empty, or the node of
  // each of P ranks. Gives int32: route (W,), W from the data; receive_index
  // (R,); num_tokens_per_expert (e,); offsets (e,), ends of the experts' rows.
  m.def(
      "plan(Tensor topk_ids, SymInt num_experts, str group_name, "
      "SymInt align=1, SymInt max_recv_tokens=-1, int[] reduction_map=[]) -> "
      "(Tensor route, Tensor receive_index, Tensor num_tokens_per_expert, "
      "Tensor offsets)",
      tags);
  // Not collective. Part `part` of [0, num_parts): part 0 has the rows inside
  // the node, the others pieces of the rest. Shapes and dtypes as of plan.
  m.def(
      "plan_part(Tensor route, Tensor offsets, int part, int num_parts) -> "
      "(Tensor route, Tensor receive_index, Tensor num_tokens_per_expert, "
      "Tensor offsets)",
      tags);
  // Not collective. int64 (16,): fingerprint (its bits), T, total tokens of
  // all ranks, K, E, align, R, dropped entries of this rank, S, land rows,
  // rank, P, nodes, own node, 1 if a node sends one sum per token (what a
  // packed combine needs), 0. Of a plan that a device has made with a bound,
  // dropped entries are -1, and rows are those that there may be.
  m.def("route_facts(Tensor route) -> Tensor", tags);
  // Not collective. int32 (P,): the node of each rank in the order of sums.
  m.def("route_reduction_map(Tensor route) -> Tensor", tags);
  // Collective. xs: one or more tensors (T, ...) of any dtype ((S, ...) when
  // packed), not empty; the same trailing shapes and dtypes on all ranks.
  // topk_weights: (T, K), float64, float32, bfloat16 or float16.
  // recv[i]: (R, ...) as xs[i], padding is zero; recv_weights: (R,) as
  // topk_weights, or (0,) float32.
  m.def(
      "dispatch(Tensor[] xs, Tensor? topk_weights, Tensor route, "
      "Tensor receive_index, str group_name, bool packed=False) -> "
      "(Tensor[] recv, Tensor recv_weights)",
      tags);
  // Collective. rows: (R, H) float64, float32, bfloat16 or float16; weights,
  // scalars: (R,), any of these; trailing dimensions may be more than H. out:
  // (T, H) as rows, the weighted sums; (S, H), one sum per send row, when
  // packed. scalars_out: (T, K) in the sum type of rows, what scalars has for
  // each expert of a token, 0 where there is none (or it was dropped); (0,) in
  // the sum type without scalars. num_tokens and topk: those of the route, or
  // -1 for them.
  m.def(
      "combine(Tensor rows, Tensor? weights, Tensor? scalars, Tensor route, "
      "Tensor receive_index, str group_name, SymInt num_tokens, SymInt topk, "
      "bool packed=False) -> (Tensor out, Tensor scalars_out)",
      tags);
  // x: (T, ...), any dtype. For each of N routes (S_i, ...): the row of the
  // token of each send row. What a packed dispatch sends.
  m.def("pack_rows(Tensor x, Tensor[] routes) -> Tensor[]", tags);
  // partials[i]: (S_i, H) of packed combines on the parts of one plan, every
  // part once. (num_tokens, H): what one combine on the whole plan gives, to
  // the bit. The gradient of pack_rows, and pack_rows is the gradient of this.
  m.def(
      "reduce_partials(Tensor[] partials, Tensor[] routes, "
      "SymInt num_tokens) -> Tensor",
      tags);
  // grads, values: (R, H) of one dtype as rows of combine; weights: (R,) float
  // or None for 1. scaled: (R, H) weights[r] * grads[r]; dots: (R,) in the sum
  // type, the dot products of grads[r] and values[r]. index: (R,) int32; where
  // it is negative (padding), rows of scaled and dots are zero.
  m.def(
      "scale_and_dot(Tensor grads, Tensor values, Tensor? weights, "
      "Tensor index) -> (Tensor scaled, Tensor dots)",
      tags);
  // One rank, no group. x: (T, ...) any dtype; topk_ids as of plan. rows:
  // (R, ...) sorted by (expert, token, k), padding is zero; index: (R,) int32
  // the slot token * K + k of each row, -1 for padding; int32
  // num_tokens_per_expert and offsets: (E,). R from the data.
  m.def(
      "permute(Tensor x, Tensor topk_ids, SymInt num_experts, "
      "SymInt align=1) -> (Tensor rows, Tensor index, "
      "Tensor num_tokens_per_expert, Tensor offsets)",
      tags);
  // rows: (R, H) as of combine; index of permute; weights: (R,), or None for
  // 1. (num_tokens, H): for every token the weighted sum of its rows.
  m.def(
      "unpermute(Tensor rows, Tensor? weights, Tensor index, "
      "SymInt num_tokens, SymInt topk) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(automoe, CPU, m) {
  m.impl("plan", &automoe::plan);
  m.impl("plan_part", &automoe::planPart);
  m.impl("route_facts", &automoe::routeFacts);
  m.impl("route_reduction_map", &automoe::routeReductionMap);
  m.impl("dispatch", &automoe::dispatch);
  m.impl("combine", &automoe::combine);
  m.impl("pack_rows", &automoe::packRows);
  m.impl("reduce_partials", &automoe::reducePartials);
  m.impl("scale_and_dot", &automoe::scaleAndDot);
  m.impl("permute", &automoe::permute);
  m.impl("unpermute", &automoe::unpermute);
}

namespace {

void addDeviceOperators(torch::Library& m) {
  namespace on = automoe::on_device;
  m.impl("plan", &automoe::plan);
  m.impl("plan_part", &on::planPart);
  m.impl("dispatch", &automoe::dispatch);
  m.impl("combine", &automoe::combine);
  m.impl("pack_rows", &on::packRows);
  m.impl("reduce_partials", &on::reducePartials);
  m.impl("scale_and_dot", &on::scaleAndDot);
  m.impl("permute", &on::permute);
  m.impl("unpermute", &on::unpermute);
}

}  // namespace

TORCH_LIBRARY_IMPL(automoe, CUDA, m) {
  addDeviceOperators(m);
}

TORCH_LIBRARY_IMPL(automoe, PrivateUse1, m) {
  addDeviceOperators(m);
}
