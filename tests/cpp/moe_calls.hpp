// SPDX-License-Identifier: Apache-2.0
// Tokens, experts and what a plan, a dispatch and a combine must make of them,
// in plain loops.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "buffers.hpp"
#include "process_group/exchange/route.hpp"
#include "ranks.hpp"

namespace automoe::testing {

/// The ids of all ranks.
struct Routing {
  int64_t numExperts = 1;
  int64_t topK = 1;
  std::vector<std::vector<int32_t>> ids = {};  // by rank, (T, K)
  int64_t align = 1;
  int64_t maxReceiveTokens = -1;
  std::vector<int32_t> reductionMap = {};

  int64_t numTokens(int rank) const {
    return static_cast<int64_t>(ids[static_cast<size_t>(rank)].size()) / topK;
  }
  int32_t id(int rank, int64_t token, int64_t k) const {
    return ids[static_cast<size_t>(rank)]
              [static_cast<size_t>(token * topK + k)];
  }
  int rankOf(int32_t expert) const {
    const auto size = static_cast<int64_t>(ids.size());
    return static_cast<int>(expert / ((numExperts + size - 1) / size));
  }
};

inline Routing randomRouting(
    int size, int64_t experts, int64_t topK, int64_t tokens, unsigned seed) {
  Routing routing{.numExperts = experts, .topK = topK};
  std::mt19937 random(seed);
  for (int rank = 0; rank < size; ++rank) {
    // One rank has none, the others differ.
    const auto count = rank == 1 && size > 2
                           ? 0U
                           : random() % static_cast<unsigned>(2 * tokens + 1);
    std::vector<int32_t> ids(count * static_cast<size_t>(topK));
    for (int32_t& id : ids) {
      id = static_cast<int32_t>(random() % static_cast<unsigned>(experts + 1)) -
           1;
    }
    routing.ids.push_back(std::move(ids));
  }
  return routing;
}

// Values that are told apart, and whose sums are rounded.
inline float valueOf(int rank, int64_t token, int64_t column) {
  return static_cast<float>(rank * 1000 + token) / 7.0F +
         static_cast<float>(column) / 3.0F;
}
inline float weightOf(int rank, int64_t token, int64_t k) {
  return static_cast<float>((rank * 31 + token * 7 + k * 3) % 17) / 9.0F;
}
/// What expert `expert` makes of a row.
inline float expertOf(int32_t expert, float value) {
  return value * (1.0F + static_cast<float>(expert) / 11.0F);
}

/// A receive row of a rank: which slot of which token it holds.
struct Received {
  int source = -1;
  int64_t token = -1;
  int64_t k = -1;
  int32_t expert = -1;
  bool isPadding() const { return source < 0; }
};

inline std::vector<Received> expectedRows(const Routing& routing, int rank) {
  std::vector<Received> rows;
  for (int32_t expert = 0; expert < routing.numExperts; ++expert) {
    if (routing.rankOf(expert) != rank) {
      continue;
    }
    for (int source = 0; source < static_cast<int>(routing.ids.size());
         ++source) {
      for (int64_t token = 0; token < routing.numTokens(source); ++token) {
        for (int64_t k = 0; k < routing.topK; ++k) {
          if (routing.id(source, token, k) == expert) {
            rows.push_back({source, token, k, expert});
          }
        }
      }
    }
    while (rows.size() % static_cast<size_t>(routing.align) != 0) {
      rows.emplace_back();
    }
  }
  if (routing.maxReceiveTokens >= 0) {
    rows.resize(static_cast<size_t>(routing.maxReceiveTokens));
  }
  return rows;
}

inline std::shared_ptr<RouteBuilder> startPlan(
    Group& group, const Routing& routing) {
  const int rank = group.topology().rank();
  return std::make_shared<RouteBuilder>(
      group.topology(),
      PlanArguments{
          .topkIds = routing.ids[static_cast<size_t>(rank)],
          .numTokens = routing.numTokens(rank),
          .topK = routing.topK,
          .numExperts = routing.numExperts,
          .align = routing.align,
          .maxReceiveTokens = routing.maxReceiveTokens,
          .reductionMap = routing.reductionMap});
}

inline PlanResult makePlan(
    Engine& engine, Group& group, const Routing& routing) {
  const auto builder = startPlan(group, routing);
  finish(engine, *group.plan(builder, std::chrono::seconds(30), {}));
  return builder->finish();
}

/// The tensors of one dispatch and the combine after it, of one rank.
class MoeCall {
 public:
  MoeCall(const Routing& routing, const PlanResult& plan, int rank, size_t h)
      : routing_(routing), plan_(plan), rank_(rank), h_(h) {
    const auto tokens = static_cast<size_t>(routing.numTokens(rank));
    const auto slots = tokens * static_cast<size_t>(routing.topK);
    x_.resize(tokens * h);
    weights_.resize(slots);
    for (int64_t t = 0; t < routing.numTokens(rank); ++t) {
      for (size_t c = 0; c < h; ++c) {
        x_[static_cast<size_t>(t) * h + c] =
            valueOf(rank, t, static_cast<int64_t>(c));
      }
      for (int64_t k = 0; k < routing.topK; ++k) {
        weights_[static_cast<size_t>(t * routing.topK + k)] =
            weightOf(rank, t, k);
      }
    }
    received_.assign(plan.receiveIndex.size() * h, -1.0F);
    receivedWeights_.assign(plan.receiveIndex.size(), -1.0F);
    out_.assign(tokens * h, -1.0F);
    scalarsOut_.assign(slots, -1.0F);
  }

  DispatchArguments dispatchArguments() {
    DispatchArguments arguments;
    arguments.route = plan_.route;
    arguments.receiveIndex = plan_.receiveIndex;
    arguments.fields = {
        {bytes(x_), mutableBytes(received_), h_ * sizeof(float)}};
    arguments.weights = bytes(weights_);
    arguments.receivedWeights = mutableBytes(receivedWeights_);
    arguments.weightBytes = sizeof(float);
    return arguments;
  }

  void expectDispatched() const {
    const auto rows = expectedRows(routing_, rank_);
    ASSERT_EQ(rows.size(), plan_.receiveIndex.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const Received& row = rows[i];
      for (size_t c = 0; c < h_; ++c) {
        const float expected =
            row.isPadding()
                ? 0.0F
                : valueOf(row.source, row.token, static_cast<int64_t>(c));
        ASSERT_EQ(received_[i * h_ + c], expected)
            << "rank " << rank_ << " row " << i << " column " << c;
      }
      ASSERT_EQ(
          receivedWeights_[i],
          row.isPadding() ? 0.0F : weightOf(row.source, row.token, row.k));
    }
  }

  /// Each row by its expert; its scalar is its weight and its expert.
  CombineArguments combineArguments(bool weighted) {
    const auto rows = expectedRows(routing_, rank_);
    expertOut_.assign(received_.size(), 0.0F);
    scalars_.assign(rows.size(), 0.0F);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].isPadding()) {
        continue;
      }
      scalars_[i] =
          receivedWeights_[i] + static_cast<float>(100 * rows[i].expert);
      for (size_t c = 0; c < h_; ++c) {
        expertOut_[i * h_ + c] =
            expertOf(rows[i].expert, received_[i * h_ + c]);
      }
    }
    CombineArguments arguments;
    arguments.route = plan_.route;
    arguments.receiveIndex = plan_.receiveIndex;
    arguments.dtype = kernels::DType::kFloat32;
    arguments.elements = h_;
    arguments.rows = bytes(expertOut_);
    arguments.weighted = weighted;
    arguments.weights = bytes(receivedWeights_);
    arguments.withScalars = true;
    arguments.scalars = bytes(scalars_);
    arguments.out = mutableBytes(out_);
    arguments.scalarsOut = mutableBytes(scalarsOut_);
    return arguments;
  }

  /// `map` is by rank: the order of sums.
  void expectCombined(const std::vector<int32_t>& map, bool weighted) const {
    const int32_t labels = *std::max_element(map.begin(), map.end()) + 1;
    for (int64_t t = 0; t < routing_.numTokens(rank_); ++t) {
      for (size_t c = 0; c < h_; ++c) {
        float sum = 0;
        bool any = false;
        for (int32_t label = 0; label < labels; ++label) {
          addLabel(map, label, weighted, t, c, sum, any);
        }
        ASSERT_EQ(out_[static_cast<size_t>(t) * h_ + c], sum)
            << "rank " << rank_ << " token " << t << " column " << c;
      }
      for (int64_t k = 0; k < routing_.topK; ++k) {
        const int32_t expert = routing_.id(rank_, t, k);
        ASSERT_EQ(
            scalarsOut_[static_cast<size_t>(t * routing_.topK + k)],
            expert < 0
                ? 0.0F
                : weightOf(rank_, t, k) + static_cast<float>(100 * expert));
      }
    }
  }

  const std::vector<float>& out() const { return out_; }

 private:
  static const std::byte* bytes(const std::vector<float>& from) {
    return reinterpret_cast<const std::byte*>(from.data());
  }
  static std::byte* mutableBytes(std::vector<float>& to) {
    return reinterpret_cast<std::byte*>(to.data());
  }

  void addLabel(
      const std::vector<int32_t>& map,
      int32_t label,
      bool weighted,
      int64_t t,
      size_t c,
      float& sum,
      bool& any) const {
    float partial = 0;
    bool anyHere = false;
    for (int32_t expert = 0; expert < routing_.numExperts; ++expert) {
      if (map[static_cast<size_t>(routing_.rankOf(expert))] != label) {
        continue;
      }
      for (int64_t k = 0; k < routing_.topK; ++k) {
        if (routing_.id(rank_, t, k) != expert) {
          continue;
        }
        volatile float term =
            expertOf(expert, valueOf(rank_, t, static_cast<int64_t>(c)));
        if (weighted) {
          term = term * weightOf(rank_, t, k);
        }
        partial = anyHere ? partial + term : term;
        anyHere = true;
      }
    }
    if (anyHere) {
      sum = any ? sum + partial : partial;
      any = true;
    }
  }

  const Routing& routing_;
  const PlanResult& plan_;
  int rank_;
  size_t h_;
  std::vector<float> x_, weights_, received_, receivedWeights_;
  std::vector<float> expertOut_, scalars_, out_, scalarsOut_;
};

}  // namespace automoe::testing
