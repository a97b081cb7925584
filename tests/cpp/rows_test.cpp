// SPDX-License-Identifier: Apache-2.0
// Moving, comparing, probing and counting rows.
#include "kernels/rows.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

namespace automoe::kernels {
namespace {

using Bytes = std::vector<std::byte>;

constexpr size_t kRowBytes[] = {1, 2, 3, 4, 7, 8, 9, 16, 63, 64, 65, 600, 2048};

/// Rows at an odd address, up to the end of the memory.
Bytes randomRows(std::mt19937& random, size_t rows, size_t rowBytes) {
  Bytes bytes(1 + rows * rowBytes);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  return bytes;
}

Bytes rowOf(const Bytes& rows, int32_t row, size_t rowBytes) {
  const auto from = rows.begin() + 1 +
                    static_cast<ptrdiff_t>(static_cast<size_t>(row) * rowBytes);
  return {from, from + static_cast<ptrdiff_t>(rowBytes)};
}

TEST(RowsTest, GatherTakesAnyRowAnyNumberOfTimes) {
  std::mt19937 random(1);
  for (const size_t rowBytes : kRowBytes) {
    const Bytes from = randomRows(random, 5, rowBytes);
    const std::vector<int32_t> index = {4, 0, 0, 2, 3, 4, 1, 1};
    Bytes to(1 + index.size() * rowBytes);
    gatherRows(to.data() + 1, from.data() + 1, index, rowBytes);
    EXPECT_EQ(to[0], std::byte{0});
    for (size_t i = 0; i < index.size(); ++i) {
      EXPECT_EQ(
          rowOf(to, static_cast<int32_t>(i), rowBytes),
          rowOf(from, index[i], rowBytes));
    }
  }
}

TEST(RowsTest, ScatterLeavesTheOtherRows) {
  std::mt19937 random(2);
  for (const size_t rowBytes : kRowBytes) {
    const std::vector<int32_t> index = {6, 0, 3};
    const Bytes from = randomRows(random, index.size(), rowBytes);
    const Bytes before = randomRows(random, 7, rowBytes);
    Bytes to = before;
    scatterRows(to.data() + 1, index, from.data() + 1, rowBytes);
    EXPECT_EQ(to[0], before[0]);
    for (int32_t row = 0; row < 7; ++row) {
      const auto found = std::find(index.begin(), index.end(), row);
      const auto i = static_cast<int32_t>(found - index.begin());
      const bool written = found != index.end();
      EXPECT_EQ(
          rowOf(to, row, rowBytes),
          written ? rowOf(from, i, rowBytes) : rowOf(before, row, rowBytes));
    }
  }
}

TEST(RowsTest, GatherUndoesScatter) {
  std::mt19937 random(3);
  std::vector<int32_t> index(100);
  for (size_t i = 0; i < index.size(); ++i) {
    index[i] = static_cast<int32_t>(i);
  }
  std::shuffle(index.begin(), index.end(), random);
  const Bytes rows = randomRows(random, index.size(), 130);
  Bytes scattered(rows.size());
  Bytes again(rows.size());
  again[0] = rows[0];
  scatterRows(scattered.data() + 1, index, rows.data() + 1, 130);
  gatherRows(again.data() + 1, scattered.data() + 1, index, 130);
  EXPECT_EQ(again, rows);
}

TEST(RowsTest, NoRowAndNoByteAreFine) {
  std::byte byte{1};
  gatherRows(&byte, nullptr, {}, 8);
  scatterRows(&byte, {}, nullptr, 8);
  const std::vector<int32_t> index = {0, 1};
  gatherRows(nullptr, nullptr, index, 0);
  scatterRows(nullptr, index, nullptr, 0);
  EXPECT_EQ(byte, std::byte{1});
  EXPECT_TRUE(sameRow(nullptr, nullptr, 0));
  EXPECT_EQ(probeRow(nullptr, 0), probeRow(nullptr, 0));
}

TEST(RowsTest, SameRowSeesEveryByte) {
  std::mt19937 random(4);
  for (const size_t rowBytes : kRowBytes) {
    const Bytes a = randomRows(random, 1, rowBytes);
    Bytes b = a;
    EXPECT_TRUE(sameRow(a.data() + 1, b.data() + 1, rowBytes));
    for (size_t i = 1; i <= rowBytes; ++i) {
      b[i] ^= std::byte{0x10};
      EXPECT_FALSE(sameRow(a.data() + 1, b.data() + 1, rowBytes));
      b[i] = a[i];
    }
  }
}

TEST(RowsTest, EqualRowsHaveEqualProbes) {
  std::mt19937 random(5);
  for (const size_t rowBytes : kRowBytes) {
    const Bytes row = randomRows(random, 1, rowBytes);
    const Bytes moved(row.begin() + 1, row.end());
    EXPECT_EQ(
        probeRow(row.data() + 1, rowBytes), probeRow(moved.data(), rowBytes));
  }
}

TEST(RowsTest, ProbesOfDifferentRowsDiffer) {
  std::mt19937 random(6);
  for (const size_t rowBytes : {size_t{8}, size_t{24}, size_t{2048}}) {
    std::set<uint64_t> probes;
    for (int i = 0; i < 10000; ++i) {
      const Bytes row = randomRows(random, 1, rowBytes);
      probes.insert(probeRow(row.data() + 1, rowBytes));
    }
    EXPECT_EQ(probes.size(), 10000U);
  }
}

TEST(RowsTest, ProbeOfAShortRowSeesEveryByte) {
  for (size_t rowBytes = 1; rowBytes <= 64; ++rowBytes) {
    Bytes row(rowBytes);
    const uint64_t zeros = probeRow(row.data(), rowBytes);
    for (size_t i = 0; i < rowBytes; ++i) {
      for (int bit = 0; bit < 8; ++bit) {
        row[i] = std::byte{1} << bit;
        EXPECT_NE(probeRow(row.data(), rowBytes), zeros) << rowBytes;
      }
      row[i] = std::byte{0};
    }
  }
}

TEST(RowsTest, ProbeOfALongRowSeesBothEnds) {
  Bytes row(1000);
  const uint64_t zeros = probeRow(row.data(), row.size());
  for (const size_t i : {size_t{0}, row.size() - 1}) {
    row[i] = std::byte{1};
    EXPECT_NE(probeRow(row.data(), row.size()), zeros);
    row[i] = std::byte{0};
  }
}

TEST(RowsTest, CountsOnlyIdsInRange) {
  const std::vector<int32_t> ids = {2, 0, -1, 2, 3, 2147483647, -2147483647, 2};
  std::vector<int32_t> counts = {10, 0, 0};
  countIds(ids, counts);
  EXPECT_EQ(counts, (std::vector<int32_t>{11, 0, 3}));
  countIds(ids, {});
}

}  // namespace
}  // namespace automoe::kernels
