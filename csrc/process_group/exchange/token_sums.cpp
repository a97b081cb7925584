// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/token_sums.hpp"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "kernels/reduce.hpp"
#include "process_group/common/error.hpp"

namespace automoe {

TokenSums::TokenSums(const Route& route, const CombineArguments& arguments)
    : route_(route),
      arguments_(arguments),
      arrivals_(static_cast<size_t>(route.numNodes())),
      nodeRanks_(arrivals_.size()) {
  for (int node = 0; node < route.numNodes(); ++node) {
    Arrivals& from = arrivals_[static_cast<size_t>(node)];
    from.next = from.cursor = route.sendBegin(node);
  }
  for (int rank = 0; rank < route.size(); ++rank) {
    const auto node =
        static_cast<size_t>(route.nodeOfRank()[static_cast<size_t>(rank)]);
    nodeRanks_[node].push_back(rank);
  }
  if (arguments_.withScalars && route.numTokens() > 0) {
    std::memset(
        arguments_.scalarsOut,
        0,
        static_cast<size_t>(route.numTokens() * route.topK()) *
            arguments_.scalarBytes());
  }
}

uint64_t TokenSums::missing(int node) const {
  return route_.sendBegin(node + 1) - arrivals_[static_cast<size_t>(node)].next;
}

void TokenSums::arrived(
    int node, uint64_t first, uint64_t rows, Bytes chunk, size_t bytes) {
  Arrivals& from = arrivals_[static_cast<size_t>(node)];
  if (first != from.next - route_.sendBegin(node) || rows == 0 ||
      rows > missing(node)) {
    throw TransportError(concat(
        "rows ", first, " to ", first + rows, " are not the next of a node"));
  }
  Chunk it{from.next, from.next + rows, std::move(chunk)};
  const size_t expected = combineChunkBytes(
      route_,
      arguments_,
      rows,
      route_.sendSlotBegin(it.end) - route_.sendSlotBegin(it.begin));
  if (bytes != expected) {
    throw TransportError(concat(
        "a chunk of ",
        rows,
        " rows has ",
        bytes,
        " bytes, expected ",
        expected));
  }
  from.next = it.end;
  if (arguments_.withScalars) {
    takeScalars(it);
  }
  if (arguments_.packed) {
    takePacked(it);
  } else {
    from.chunks.push_back(std::move(it));
  }
  advance();
}

void TokenSums::takeScalars(const Chunk& chunk) const {
  const size_t firstSlot = route_.sendSlotBegin(chunk.begin);
  const size_t entries = route_.sendSlotBegin(chunk.end) - firstSlot;
  const size_t bytes = arguments_.scalarBytes();
  const std::byte* from =
      chunk.bytes.get() +
      combineChunkBytes(route_, arguments_, chunk.end - chunk.begin, entries) -
      entries * bytes;
  for (size_t row = chunk.begin; row < chunk.end; ++row) {
    for (const int32_t slot : route_.sendSlots(row)) {
      std::memcpy(
          arguments_.scalarsOut + static_cast<size_t>(slot) * bytes,
          from,
          bytes);
      from += bytes;
    }
  }
}

void TokenSums::takePacked(const Chunk& chunk) {
  const size_t rowBytes = arguments_.rowBytes();
  if (rowBytes > 0) {
    std::memcpy(
        arguments_.out + chunk.begin * rowBytes,
        chunk.bytes.get(),
        (chunk.end - chunk.begin) * rowBytes);
  }
}

void TokenSums::advance() {
  if (done_) {
    return;
  }
  if (!arguments_.packed) {
    while (token_ < route_.numTokens() && sumToken(token_)) {
      token_ += 1;
    }
    done_ = token_ == route_.numTokens();
    return;
  }
  done_ = true;
  for (int node = 0; node < route_.numNodes(); ++node) {
    done_ = done_ && missing(node) == 0;
  }
}

bool TokenSums::sumToken(int64_t token) {
  rows_.clear();
  terms_.clear();
  const auto isNext = [&](int node, const Arrivals& from) {
    return from.cursor < route_.sendBegin(node + 1) &&
           route_.sendToken(from.cursor) == token;
  };
  for (int node = 0; node < route_.numNodes(); ++node) {
    const Arrivals& from = arrivals_[static_cast<size_t>(node)];
    if (isNext(node, from)) {
      if (from.cursor >= from.next) {
        return false;
      }
      addRow(node, from);
    }
  }
  std::byte* out =
      arguments_.out + static_cast<size_t>(token) * arguments_.rowBytes();
  if (route_.sumsPerNode()) {
    writeSums(out);
  } else {
    writeTree(out);
  }
  for (int node = 0; node < route_.numNodes(); ++node) {
    Arrivals& from = arrivals_[static_cast<size_t>(node)];
    if (isNext(node, from)) {
      from.cursor += 1;
      if (from.cursor == from.chunks.front().end) {
        from.chunks.pop_front();
      }
    }
  }
  return true;
}

void TokenSums::addRow(int node, const Arrivals& from) {
  const Chunk& chunk = from.chunks.front();
  const size_t rowBytes = arguments_.rowBytes();
  if (route_.sumsPerNode()) {
    rows_.push_back(chunk.bytes.get() + (from.cursor - chunk.begin) * rowBytes);
    return;
  }
  const size_t firstSlot = route_.sendSlotBegin(chunk.begin);
  const size_t entries = route_.sendSlotBegin(chunk.end) - firstSlot;
  const size_t begin = route_.sendSlotBegin(from.cursor) - firstSlot;
  const size_t end = route_.sendSlotBegin(from.cursor + 1) - firstSlot;
  const std::byte* weights = chunk.bytes.get() + entries * rowBytes;
  const std::byte* ranks = weights + entries * arguments_.weightBytes();
  const auto& nodeRanks = nodeRanks_[static_cast<size_t>(node)];
  for (size_t i = begin; i < end; ++i) {
    uint32_t local = 0;
    std::memcpy(&local, ranks + i * sizeof(local), sizeof(local));
    if (local >= nodeRanks.size()) {
      throw TransportError(concat("a row of local rank ", local));
    }
    const int rank = nodeRanks[local];
    terms_.push_back(
        {.label = route_.reductionMap()[static_cast<size_t>(rank)],
         .rank = rank,
         .row = chunk.bytes.get() + i * rowBytes,
         .weight = weights + i * arguments_.weightBytes()});
  }
}

void TokenSums::writeSums(std::byte* out) {
  const auto end = static_cast<uint32_t>(rows_.size());
  kernels::reduceRow(
      arguments_.dtype,
      out,
      rows_,
      nullptr,
      std::span(&end, 1),
      arguments_.elements);
}

void TokenSums::writeTree(std::byte* out) {
  std::stable_sort(
      terms_.begin(), terms_.end(), [](const Term& a, const Term& b) {
        return std::tie(a.label, a.rank) < std::tie(b.label, b.rank);
      });
  weights_.clear();
  ends_.clear();
  for (size_t i = 0; i < terms_.size(); ++i) {
    const Term& term = terms_[i];
    rows_.push_back(term.row);
    weights_.insert(
        weights_.end(), term.weight, term.weight + arguments_.weightBytes());
    if (i + 1 == terms_.size() || terms_[i + 1].label != term.label) {
      ends_.push_back(static_cast<uint32_t>(i + 1));
    }
  }
  if (ends_.empty()) {
    ends_.push_back(0);
  }
  kernels::reduceRow(
      arguments_.dtype,
      out,
      rows_,
      weights_.empty() ? nullptr : weights_.data(),
      ends_,
      arguments_.elements);
}

}  // namespace automoe
