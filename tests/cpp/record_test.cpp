// SPDX-License-Identifier: Apache-2.0
// Records and packets: what comes back, and what is refused.
#include "process_group/exchange/record.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

using Bytes = std::vector<std::byte>;

Bytes bytesOf(const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

/// A packet with blocks of its own.
struct Made {
  std::vector<Bytes> blocks;
  Packet packet;
};

Made makePacket(const std::vector<uint64_t>& sizes, bool withBlocks) {
  Made made;
  for (size_t i = 0; i < sizes.size(); ++i) {
    made.packet.sizes.push_back({sizes[i], sizes[i] * 3 + i});
    made.blocks.emplace_back(sizes[i], static_cast<std::byte>(i + 1));
  }
  if (withBlocks) {
    made.packet.blocks.assign(made.blocks.begin(), made.blocks.end());
  }
  return made;
}

void expectSame(const Packet& got, const Packet& expected) {
  ASSERT_EQ(got.sizes.size(), expected.sizes.size());
  ASSERT_EQ(got.blocks.size(), expected.blocks.size());
  for (size_t i = 0; i < got.sizes.size(); ++i) {
    EXPECT_EQ(got.sizes[i].sendBytes, expected.sizes[i].sendBytes);
    EXPECT_EQ(got.sizes[i].receiveBytes, expected.sizes[i].receiveBytes);
  }
  for (size_t i = 0; i < got.blocks.size(); ++i) {
    EXPECT_TRUE(std::equal(
        got.blocks[i].begin(),
        got.blocks[i].end(),
        expected.blocks[i].begin(),
        expected.blocks[i].end()));
  }
}

TEST(RecordTest, ComesBackAsItWas) {
  Record record;
  record.kind = RecordKind::kStaged;
  record.carrier = Carrier::kExtent;
  record.dtype = 200;
  record.group = ~uint64_t{0};
  record.sequence = uint64_t{1} << 40;
  record.source = 1023;
  record.destination = 77;
  record.owner = 3;
  record.elementBytes = 8;
  record.sendBytes = uint64_t{1} << 50;
  record.receiveBytes = 5;
  record.offset = 6;
  record.bytes = 7;
  record.place = 8;
  record.failures = 9;
  record.plan = 10;
  record.rows = 11;
  record.operation = OperationKind::kCombine;
  const Record read = parseRecord(asBytes(record));
  EXPECT_EQ(std::memcmp(&read, &record, sizeof(Record)), 0);
}

TEST(RecordTest, ShortOnesAreRefused) {
  const Record record;
  for (size_t size = 0; size < sizeof(Record); ++size) {
    const Bytes part(asBytes(record).begin(), asBytes(record).begin() + size);
    EXPECT_THROW(parseRecord(part), TransportError) << size;
  }
}

TEST(RecordTest, ForeignOnesAreRefused) {
  Record record;
  record.magic += 1;
  EXPECT_THROW(parseRecord(asBytes(record)), TransportError);
  record = Record();
  record.version += 1;
  EXPECT_THROW(parseRecord(asBytes(record)), TransportError);
  const Bytes zeros(sizeof(Record));
  EXPECT_THROW(parseRecord(zeros), TransportError);
}

TEST(PacketTest, ComesBackAsItWas) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    std::vector<uint64_t> sizes(1 + random() % 9);
    for (uint64_t& it : sizes) {
      it = random() % 4 == 0 ? 0 : random() % 2000;
    }
    sizes.back() += 1;  // blocks of no bytes at all are no blocks
    const Made made = makePacket(sizes, round % 2 == 0);
    const Bytes encoded = bytesOf(encodePacket(made.packet));
    const Packet read = decodePacket(encoded, static_cast<int>(sizes.size()));
    EXPECT_EQ(read.hasBlocks(), round % 2 == 0);
    expectSame(read, made.packet);
  }
}

TEST(PacketTest, SizesWithoutBlocksComeBackAsSizes) {
  const Made made = makePacket({0, 0, 0}, false);
  const Bytes encoded = bytesOf(encodePacket(made.packet));
  const Packet read = decodePacket(encoded, 3);
  EXPECT_FALSE(read.hasBlocks());
  expectSame(read, made.packet);
}

TEST(PacketTest, CutAnywhereIsRefused) {
  const Made made = makePacket({10, 0, 30}, true);
  const Bytes whole = bytesOf(encodePacket(made.packet));
  const size_t sizesEnd = sizeof(uint64_t) + 3 * sizeof(Packet::Sizes);
  for (size_t size = 0; size < whole.size(); ++size) {
    const Bytes part(whole.begin(), whole.begin() + size);
    if (size == sizesEnd) {
      EXPECT_FALSE(decodePacket(part, 3).hasBlocks());
    } else {
      EXPECT_THROW(decodePacket(part, 3), TransportError) << size;
    }
  }
}

TEST(PacketTest, BytesBehindItAreRefused) {
  const Made made = makePacket({10, 0, 30}, true);
  Bytes bytes = bytesOf(encodePacket(made.packet));
  bytes.push_back(std::byte{0});
  EXPECT_THROW(decodePacket(bytes, 3), TransportError);
}

TEST(PacketTest, AnotherNumberOfRanksIsRefused) {
  const Made made = makePacket({10, 20}, true);
  const Bytes bytes = bytesOf(encodePacket(made.packet));
  EXPECT_NO_THROW(decodePacket(bytes, 2));
  EXPECT_THROW(decodePacket(bytes, 1), TransportError);
  EXPECT_THROW(decodePacket(bytes, 3), TransportError);
}

TEST(PacketTest, HugeNumbersAreRefused) {
  const Made made = makePacket({10, 20}, true);
  const Bytes good = bytesOf(encodePacket(made.packet));
  for (const uint64_t value :
       {~uint64_t{0}, ~uint64_t{0} - 7, uint64_t{1} << 63, uint64_t{1} << 32}) {
    for (const size_t place : {size_t{0}, size_t{8}, size_t{24}}) {
      Bytes bytes = good;
      std::memcpy(bytes.data() + place, &value, sizeof(value));
      EXPECT_THROW(decodePacket(bytes, 2), TransportError)
          << value << " at " << place;
    }
  }
}

TEST(PacketTest, DamagedOnesAreRefusedOrStayInside) {
  std::mt19937_64 random(99);
  int refused = 0;
  int read = 0;
  for (int round = 0; round < 20000; ++round) {
    const Made made =
        makePacket({random() % 40, random() % 40, 1}, random() % 4 != 0);
    // Exactly as many bytes as there are, for the sanitizer.
    Bytes bytes = bytesOf(encodePacket(made.packet));
    for (uint64_t i = random() % 4; i > 0; --i) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    if (random() % 3 == 0) {
      bytes.resize(random() % bytes.size());
      bytes.shrink_to_fit();
    }
    try {
      const Packet packet = decodePacket(bytes, 3);
      for (const auto& block : packet.blocks) {
        ASSERT_TRUE(
            block.empty() ||
            (block.data() >= bytes.data() &&
             block.data() + block.size() <= bytes.data() + bytes.size()));
      }
      read += 1;
    } catch (const TransportError&) {
      refused += 1;
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(read, 1000);
}

TEST(RecordTest, DamagedOnesAreRefusedOrRead) {
  std::mt19937_64 random(98);
  int refused = 0;
  for (int round = 0; round < 20000; ++round) {
    const Record record;
    Bytes bytes(asBytes(record).begin(), asBytes(record).end());
    bytes[random() % 8] = static_cast<std::byte>(random());
    bytes.resize(random() % 100);
    bytes.shrink_to_fit();
    try {
      const Record read = parseRecord(bytes);
      EXPECT_EQ(read.magic, Record::kMagic);
      EXPECT_EQ(read.version, Record::kVersion);
      EXPECT_GE(bytes.size(), sizeof(Record));
    } catch (const TransportError&) {
      refused += 1;
    }
  }
  EXPECT_GT(refused, 10000);
}

}  // namespace
}  // namespace automoe
