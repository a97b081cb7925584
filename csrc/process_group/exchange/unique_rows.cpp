// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/unique_rows.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/rows.hpp"
#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr uint64_t kChunkBytes = 60 * 1024;
// A saving below this does not pay for the search and the lists.
constexpr double kSmallestSaving = 0.15;
constexpr size_t kHeader = 2 * sizeof(uint32_t);
constexpr size_t kEnd = sizeof(uint32_t);

using Blocks = std::span<const std::span<const std::byte>>;

size_t countRows(Blocks blocks, size_t rowBytes) {
  size_t count = 0;
  for (const auto& block : blocks) {
    count += block.size() / rowBytes;
  }
  return count;
}

template <typename Use>
void forEachRow(Blocks blocks, size_t rowBytes, const Use& use) {
  for (size_t local = 0; local < blocks.size(); ++local) {
    const size_t count = blocks[local].size() / rowBytes;
    for (size_t row = 0; row < count; ++row) {
      use(static_cast<uint32_t>(local),
          static_cast<uint32_t>(row),
          blocks[local].data() + row * rowBytes);
    }
  }
}

/// A look at one word of each row. Which rows are in the sample depends on that
/// word, so that equal rows are in it together or not at all.
bool mayPay(Blocks blocks, size_t rowBytes) {
  const size_t count = countRows(blocks, rowBytes);
  const uint64_t skip = count >= 1024 ? 15 : count >= 128 ? 3 : 0;
  const size_t at = rowBytes / 2;
  std::vector<uint64_t> sample;
  forEachRow(blocks, rowBytes, [&](uint32_t, uint32_t, const std::byte* row) {
    uint64_t word = 0;
    std::memcpy(&word, row + at, sizeof(word));
    word *= 0x9e3779b97f4a7c15;
    if (((word >> 60) & skip) == 0) {
      sample.push_back(word);
    }
  });
  std::sort(sample.begin(), sample.end());
  const auto different = static_cast<double>(
      std::unique(sample.begin(), sample.end()) - sample.begin());
  return different <=
         (1 - kSmallestSaving) * static_cast<double>(sample.size());
}

uint32_t readWord(const std::byte* from, size_t index) {
  uint32_t word = 0;
  std::memcpy(&word, from + index * sizeof(word), sizeof(word));
  return word;
}

}  // namespace

std::optional<UniqueRows> UniqueRows::find(Blocks blocks, size_t rowBytes) {
  if (rowBytes < kSmallestUniqueRow ||
      std::any_of(blocks.begin(), blocks.end(), [&](const auto& block) {
        return block.size() % rowBytes != 0;
      })) {
    return std::nullopt;
  }
  // More rows than the lists can number go as they are.
  const size_t count = countRows(blocks, rowBytes);
  if (count < 2 || count > INT32_MAX || !mayPay(blocks, rowBytes)) {
    return std::nullopt;
  }
  UniqueRows unique;
  unique.rowBytes_ = rowBytes;
  unique.collect(blocks);
  const auto rows = static_cast<double>(unique.numRows());
  if (rows > (1 - kSmallestSaving) * static_cast<double>(count)) {
    return std::nullopt;  // the sample was wrong
  }
  unique.cutChunks();
  return unique;
}

void UniqueRows::collect(Blocks blocks) {
  struct Seen {
    uint64_t probe;
    uint32_t row;
  };
  constexpr uint32_t kFree = UINT32_MAX;
  const size_t count = countRows(blocks, rowBytes_);
  std::vector<Seen> table(std::bit_ceil(2 * count), Seen{0, kFree});
  std::vector<std::pair<uint32_t, Reference>> found;  // unique row, where
  found.reserve(count);
  const auto rowOf = [&](const std::byte* row) {
    const uint64_t probe = kernels::probeRow(row, rowBytes_);
    size_t at = probe & (table.size() - 1);
    while (table[at].row != kFree) {
      if (table[at].probe == probe &&
          kernels::sameRow(rows_[table[at].row], row, rowBytes_)) {
        return table[at].row;
      }
      at = (at + 1) & (table.size() - 1);
    }
    table[at] = {probe, static_cast<uint32_t>(rows_.size())};
    rows_.push_back(row);
    return table[at].row;
  };
  forEachRow(
      blocks,
      rowBytes_,
      [&](uint32_t local, uint32_t row, const std::byte* data) {
        found.push_back({rowOf(data), {local, row}});
      });
  referenceBegins_.assign(rows_.size() + 1, 0);
  for (const auto& [row, reference] : found) {
    referenceBegins_[row + 1] += 1;
  }
  for (size_t row = 0; row < rows_.size(); ++row) {
    referenceBegins_[row + 1] += referenceBegins_[row];
  }
  references_.resize(count);
  std::vector<uint32_t> next(
      referenceBegins_.begin(), referenceBegins_.end() - 1);
  for (const auto& [row, reference] : found) {
    references_[next[row]++] = reference;
  }
}

void UniqueRows::cutChunks() {
  size_t bytes = kHeader;
  for (size_t row = 0; row < rows_.size(); ++row) {
    const size_t references = referenceBegins_[row + 1] - referenceBegins_[row];
    const size_t more = rowBytes_ + kEnd + references * sizeof(Reference);
    if (bytes > kHeader && bytes + more > kChunkBytes) {
      chunkEnds_.push_back(row);
      bytes_ += bytes;
      bytes = kHeader;
    }
    bytes += more;
  }
  chunkEnds_.push_back(rows_.size());
  bytes_ += bytes;
}

uint32_t UniqueRows::chunkRows(size_t chunk) const {
  return static_cast<uint32_t>(chunkEnds_[chunk] - chunkBegin(chunk));
}

size_t UniqueRows::chunkBytes(size_t chunk) const {
  const size_t references =
      referenceBegins_[chunkEnds_[chunk]] - referenceBegins_[chunkBegin(chunk)];
  return kHeader + chunkRows(chunk) * (kEnd + rowBytes_) +
         references * sizeof(Reference);
}

void UniqueRows::writeChunk(size_t chunk, std::byte* to) const {
  const size_t begin = chunkBegin(chunk);
  const size_t end = chunkEnds_[chunk];
  const uint32_t first = referenceBegins_[begin];
  const uint32_t references = referenceBegins_[end] - first;
  const auto put = [&](const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    to += bytes;
  };
  const uint32_t numRows = chunkRows(chunk);
  put(&numRows, sizeof(numRows));
  put(&references, sizeof(references));
  for (size_t row = begin; row < end; ++row) {
    const uint32_t last = referenceBegins_[row + 1] - first;
    put(&last, sizeof(last));
  }
  put(&references_[first], references * sizeof(Reference));
  for (size_t row = begin; row < end; ++row) {
    put(rows_[row], rowBytes_);
  }
}

uint64_t UniqueRows::take(
    std::span<const std::byte> chunk,
    size_t rowBytes,
    uint32_t localRank,
    std::span<std::byte> block) {
  const auto check = [&](bool good) {
    if (!good) {
      throw TransportError(
          concat("a chunk of ", chunk.size(), " bytes makes no sense as rows"));
    }
  };
  check(chunk.size() >= kHeader && rowBytes > 0);
  const uint64_t numRows = readWord(chunk.data(), 0);
  const uint64_t numReferences = readWord(chunk.data(), 1);
  const uint64_t lists =
      kHeader + numRows * kEnd + numReferences * sizeof(Reference);
  check(lists <= chunk.size() && chunk.size() - lists == numRows * rowBytes);
  const std::byte* ends = chunk.data() + kHeader;
  const std::byte* references = ends + numRows * kEnd;
  const std::byte* rows = chunk.data() + lists;
  const uint64_t blockRows = block.size() / rowBytes;
  uint64_t taken = 0;
  uint64_t at = 0;
  for (uint64_t row = 0; row < numRows; ++row) {
    const uint32_t end = readWord(ends, row);
    check(end >= at && end <= numReferences);
    for (; at < end; ++at) {
      if (readWord(references, 2 * at) != localRank) {
        continue;
      }
      const uint32_t to = readWord(references, 2 * at + 1);
      check(to < blockRows);
      std::memcpy(
          block.data() + to * rowBytes, rows + row * rowBytes, rowBytes);
      taken += rowBytes;
    }
  }
  return taken;
}

}  // namespace automoe
