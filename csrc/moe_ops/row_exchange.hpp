// SPDX-License-Identifier: Apache-2.0
// What carries plans and rows between the ranks of a process group.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/exchange/combine_arguments.hpp"
#include "process_group/exchange/record.hpp"
#include "process_group/exchange/route.hpp"
#include "process_group/exchange/row_moves.hpp"
#include "process_group/known_routes.hpp"

namespace automoe {

/// Tensors that the pointers of a call point into.
struct CallTensors {
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> outputs;
};

/// Every call is collective. Arguments that do not agree over the ranks raise
/// ValueError on every rank, with both ranks and both values. Call without the
/// GIL.
class RowExchange {
 public:
  using WorkPointer = c10::intrusive_ptr<c10d::Work>;

  virtual ~RowExchange() = default;

  virtual const Topology& topology() const = 0;
  /// Where the tensors of a dispatch or combine are, but for the route, which
  /// is on the CPU, as a plan's are.
  virtual c10::Device device() const { return c10::kCPU; }
  /// Throws InvalidArgument for a route of another group.
  virtual void checkRoute(const Route& route) const = 0;
  /// The words of a route that a call will be made with: checks them, and that
  /// the route is of this group. Throws InvalidArgument.
  virtual RouteFacts takeRoute(const at::Tensor& words);
  /// Blocks up to the group's timeout; then the builder is complete.
  virtual void plan(
      const std::shared_ptr<RouteBuilder>& builder, CallTensors tensors) = 0;
  virtual WorkPointer dispatch(
      DispatchArguments arguments, CallTensors tensors) = 0;
  virtual WorkPointer combine(
      CombineArguments arguments, CallTensors tensors) = 0;
  /// Instead of a call, because of an argument that only this rank can check.
  /// Where others make the call, they raise `fault`.
  virtual void refuse(OperationKind kind, const std::string& fault) = 0;
};

/// What `make` returns. What it refuses, the other ranks hear of.
template <typename Make>
auto checked(RowExchange& exchange, OperationKind kind, const Make& make) {
  const auto tell = [&](const char* text) {
    exchange.refuse(
        kind, concat("rank ", exchange.topology().rank(), ": ", text));
  };
  try {
    return make();
  } catch (const c10::Error& error) {
    tell(error.what_without_backtrace());
    throw;
  } catch (const InvalidArgument& error) {
    tell(error.what());
    throw;
  }
}

/// By the name of a c10d group: that of our own backend, else one over the
/// all_to_all_single of any other. ValueError for a name that is no group.
std::unique_ptr<RowExchange> findRowExchange(const std::string& groupName);

}  // namespace automoe
