// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/unique_rows.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using Bytes = std::vector<std::byte>;

std::vector<std::span<const std::byte>> views(const std::vector<Bytes>& from) {
  return {from.begin(), from.end()};
}

/// Blocks of rows drawn from `different` ones.
std::vector<Bytes> makeBlocks(
    size_t ranks, size_t rows, size_t rowBytes, size_t different) {
  std::mt19937 random(static_cast<unsigned>(different));
  std::vector<Bytes> pool(different, Bytes(rowBytes));
  for (Bytes& row : pool) {
    for (std::byte& it : row) {
      it = static_cast<std::byte>(random());
    }
  }
  std::vector<Bytes> blocks(ranks);
  for (Bytes& block : blocks) {
    for (size_t i = 0; i < rows; ++i) {
      const Bytes& row = pool[random() % different];
      block.insert(block.end(), row.begin(), row.end());
    }
  }
  return blocks;
}

void expectTaken(const std::vector<Bytes>& blocks, const UniqueRows& unique) {
  std::vector<Bytes> taken;
  std::vector<uint64_t> counts(blocks.size());
  for (const Bytes& block : blocks) {
    taken.emplace_back(block.size());
  }
  uint64_t bytes = 0;
  size_t rows = 0;
  for (size_t chunk = 0; chunk < unique.numChunks(); ++chunk) {
    Bytes message(unique.chunkBytes(chunk));
    unique.writeChunk(chunk, message.data());
    bytes += message.size();
    rows += unique.chunkRows(chunk);
    for (size_t local = 0; local < blocks.size(); ++local) {
      counts[local] += UniqueRows::take(
          message,
          unique.rowBytes(),
          static_cast<uint32_t>(local),
          taken[local]);
    }
  }
  EXPECT_EQ(bytes, unique.bytes());
  EXPECT_EQ(rows, unique.numRows());
  for (size_t local = 0; local < blocks.size(); ++local) {
    EXPECT_TRUE(taken[local] == blocks[local]);
    EXPECT_EQ(counts[local], blocks[local].size());
  }
}

TEST(UniqueRowsTest, EveryRowOnce) {
  for (size_t rowBytes : {256U, 257U, 2048U, 100000U}) {
    for (size_t rows : {1U, 17U, 300U}) {
      const auto blocks = makeBlocks(3, rows, rowBytes, (rows + 1) / 2);
      const auto unique = UniqueRows::find(views(blocks), rowBytes);
      ASSERT_TRUE(unique.has_value()) << rowBytes << " " << rows;
      EXPECT_LE(unique->numRows(), (rows + 1) / 2);
      expectTaken(blocks, *unique);
    }
  }
}

TEST(UniqueRowsTest, GivesUpWhereItSavesLittle) {
  EXPECT_FALSE(UniqueRows::find(views(makeBlocks(2, 1000, 256, 1 << 15)), 256));
  // Less than 15 % of 2000 rows are there twice.
  EXPECT_FALSE(UniqueRows::find(views(makeBlocks(2, 1000, 256, 12000)), 256));
  EXPECT_TRUE(UniqueRows::find(views(makeBlocks(2, 1000, 256, 1000)), 256));
}

TEST(UniqueRowsTest, ShortRowsAndPartsOfRowsStay) {
  EXPECT_FALSE(UniqueRows::find(views(makeBlocks(2, 100, 255, 3)), 255));
  EXPECT_FALSE(UniqueRows::find(views(makeBlocks(2, 99, 300, 3)), 271));
  EXPECT_FALSE(UniqueRows::find(views(makeBlocks(2, 0, 300, 1)), 300));
}

TEST(UniqueRowsTest, RowsThatDifferInOneBitStayApart) {
  const size_t rowBytes = 4096;
  std::vector<Bytes> blocks(2);
  for (size_t i = 0; i < 64; ++i) {
    // Half of the rows are zero; of the others each has one bit.
    Bytes row(rowBytes);
    if (i % 2 == 1) {
      row[i * 61 % rowBytes] = std::byte{1};
    }
    for (Bytes& block : blocks) {
      block.insert(block.end(), row.begin(), row.end());
    }
  }
  const auto unique = UniqueRows::find(views(blocks), rowBytes);
  ASSERT_TRUE(unique.has_value());
  EXPECT_EQ(unique->numRows(), 33U);
  expectTaken(blocks, *unique);
}

TEST(UniqueRowsTest, BrokenChunksAreRefused) {
  const auto blocks = makeBlocks(2, 20, 256, 5);
  const auto unique = UniqueRows::find(views(blocks), 256);
  ASSERT_TRUE(unique.has_value());
  Bytes chunk(unique->chunkBytes(0));
  unique->writeChunk(0, chunk.data());
  Bytes block(blocks[0].size());
  for (size_t size = 0; size < chunk.size(); ++size) {
    EXPECT_THROW(
        UniqueRows::take({chunk.data(), size}, 256, 0, block), TransportError);
  }
  std::mt19937 random(3);
  for (int i = 0; i < 20000; ++i) {
    Bytes broken = chunk;
    const uint32_t word = i % 2 == 0 ? random() : random() % 64;
    std::memcpy(broken.data() + 4 * (random() % 60), &word, sizeof(word));
    try {
      UniqueRows::take(broken, 256, 0, block);  // stays inside the block
    } catch (const TransportError&) {
    }
  }
  EXPECT_THROW(UniqueRows::take(chunk, 0, 0, block), TransportError);
  EXPECT_THROW(UniqueRows::take(chunk, 1 << 20, 0, block), TransportError);
}

}  // namespace
}  // namespace automoe::testing
