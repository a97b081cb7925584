// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/combine_blocks.hpp"

#include <cstring>
#include <memory>
#include <utility>

#include "process_group/common/bytes.hpp"
#include "process_group/exchange/partial_sums.hpp"

namespace automoe {
namespace {

struct UnitHeader {
  uint64_t rows;
  uint64_t bytes;
};

}  // namespace

std::vector<int64_t> combineBlockBytes(
    const Route& route,
    const CombineArguments& arguments,
    const Topology& topology) {
  std::vector<int64_t> blockBytes(static_cast<size_t>(topology.size()), 0);
  PartialSums partials(route, arguments, topology);
  for (; !partials.done(); partials.advance()) {
    if (partials.unit().source != topology.rank()) {
      blockBytes[static_cast<size_t>(partials.unit().source)] +=
          static_cast<int64_t>(sizeof(UnitHeader) + partials.chunkBytes());
    }
  }
  return blockBytes;
}

void packCombineBlocks(
    const Route& route,
    const CombineArguments& arguments,
    const Topology& topology,
    std::span<const int64_t> blockBytes,
    std::byte* to,
    TokenSums& sums) {
  std::vector<std::byte*> next;
  for (const int64_t bytes : blockBytes) {
    next.push_back(to);
    to += bytes;
  }
  const std::byte* const mateRows[1] = {};  // there are no node-mates
  PartialSums partials(route, arguments, topology);
  for (; !partials.done(); partials.advance()) {
    const CombineUnit unit = partials.unit();
    const UnitHeader header{unit.end - unit.begin, partials.chunkBytes()};
    if (unit.source == topology.rank()) {
      auto chunk = std::make_unique_for_overwrite<std::byte[]>(header.bytes);
      partials.make(mateRows, chunk.get());
      sums.arrived(
          topology.node(),
          unit.begin - route.landBegin(unit.source),
          header.rows,
          std::move(chunk),
          header.bytes);
      continue;
    }
    std::byte*& at = next[static_cast<size_t>(unit.source)];
    std::memcpy(at, &header, sizeof(header));
    partials.make(mateRows, at + sizeof(header));
    at += sizeof(header) + header.bytes;
  }
}

void takeCombineBlock(
    int rank, std::span<const std::byte> block, TokenSums& sums) {
  ByteReader reader(block.data(), block.size());
  uint64_t first = 0;
  while (reader.remaining() > 0) {
    const auto header = reader.get<UnitHeader>();
    const char* from = reader.take(header.bytes);
    auto chunk = std::make_unique_for_overwrite<std::byte[]>(header.bytes);
    if (header.bytes > 0) {
      std::memcpy(chunk.get(), from, header.bytes);
    }
    sums.arrived(rank, first, header.rows, std::move(chunk), header.bytes);
    first += header.rows;
  }
}

}  // namespace automoe
