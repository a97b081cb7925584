// SPDX-License-Identifier: Apache-2.0
// Two networks of one process talk over loopback.
#include "process_group/network/network.hpp"

#include <gtest/gtest.h>
#include <poll.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::seconds;

constexpr uint64_t kFirst = 1;
constexpr uint64_t kSecond = 2;

std::string content(size_t bytes, size_t seed) {
  std::string text(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i) {
    text[i] = static_cast<char>((i * 7 + seed * 13 + (i >> 8)) & 0xff);
  }
  return text;
}

std::span<const std::byte> bytesOf(const std::string& text) {
  return std::as_bytes(std::span(text));
}

struct Received {
  std::string header;
  std::string payload;
};

/// A network with what it has told.
class Node : public NetworkListener {
 public:
  Node() : network(config(), *this) {}
  ~Node() override {
    if (!closed) {
      network.close(Clock::now() + seconds(5));
    }
  }

  void messageArrived(
      std::span<const std::byte> header,
      std::span<const std::byte> payload) override {
    received.push_back(
        {std::string(
             reinterpret_cast<const char*>(header.data()), header.size()),
         std::string(
             reinterpret_cast<const char*>(payload.data()), payload.size())});
  }
  void processUnreachable(uint64_t process, const std::string& cause) override {
    unreachable.emplace_back(process, cause);
  }
  void close() {
    closed = true;
    network.close(Clock::now() + seconds(10));
  }

  std::vector<Received> received;
  std::vector<std::pair<uint64_t, std::string>> unreachable;
  bool closed = false;
  Network network;

 private:
  static Config config() {
    Config config;
    config.interface = "lo";
    return config;
  }
};

/// Moves the messages of all until `done`; false after a minute.
bool driveUntil(
    const std::vector<Node*>& nodes, const std::function<bool()>& done) {
  const auto deadline = Clock::now() + seconds(60);
  while (!done()) {
    bool worked = false;
    for (Node* it : nodes) {
      worked = it->network.progress() || worked;
    }
    if (Clock::now() > deadline) {
      return false;
    }
    if (!worked) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
  return true;
}

class NetworkTest : public ::testing::Test {
 protected:
  NetworkTest()
      : first_(std::make_unique<Node>()), second_(std::make_unique<Node>()) {
    first_->network.addProcess(kSecond, second_->network.address());
    second_->network.addProcess(kFirst, first_->network.address());
  }
  bool drive(const std::function<bool()>& done) {
    return driveUntil({first_.get(), second_.get()}, done);
  }
  /// Counts the calls of `sent`, the good and the bad ones.
  Network::Sent count() {
    return [this](bool ok) { (ok ? good_ : bad_) += 1; };
  }

  std::unique_ptr<Node> first_;
  std::unique_ptr<Node> second_;
  int good_ = 0;
  int bad_ = 0;
};

TEST_F(NetworkTest, MessagesOfEverySizeArriveWhole) {
  const std::vector<size_t> sizes = {
      0,
      1,
      7,
      100,
      4096,
      8000,
      8192,
      30000,
      60 * 1024,
      65536,
      1000003,
      5 << 20};
  std::vector<std::string> headers;
  std::vector<std::string> payloads;
  for (size_t i = 0; i < sizes.size(); ++i) {
    headers.push_back(content(88, i));
    payloads.push_back(content(sizes[i], i));
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    first_->network.send(
        kSecond, bytesOf(headers[i]), bytesOf(payloads[i]), count());
  }
  ASSERT_TRUE(drive([&] {
    return second_->received.size() == sizes.size() &&
           good_ == static_cast<int>(sizes.size());
  }));
  for (size_t i = 0; i < sizes.size(); ++i) {
    EXPECT_TRUE(second_->received[i].header == headers[i]);
    EXPECT_TRUE(second_->received[i].payload == payloads[i]) << sizes[i];
  }
  EXPECT_EQ(bad_, 0);
  EXPECT_EQ(first_->network.numPending(), 0);
}

TEST_F(NetworkTest, StorageIsKeptUntilTheMessageHasLeft) {
  for (size_t i = 0; i < 50; ++i) {
    first_->network.send(
        kSecond, bytesOf("head"), {}, count(), content(50000, i));
  }
  ASSERT_TRUE(drive([&] { return second_->received.size() == 50; }));
  for (size_t i = 0; i < 50; ++i) {
    EXPECT_TRUE(second_->received[i].payload == content(50000, i));
  }
  ASSERT_TRUE(drive([&] { return good_ == 50; }));
}

TEST_F(NetworkTest, BothDirectionsAtOnceLoseNothing) {
  constexpr int kMessages = 300;
  const std::string payload = content(60000, 5);
  for (int i = 0; i < kMessages; ++i) {
    const std::string header = std::to_string(i);
    first_->network.send(kSecond, bytesOf(header), bytesOf(payload), count());
    second_->network.send(kFirst, bytesOf(header), bytesOf(payload), count());
  }
  ASSERT_TRUE(drive([&] {
    return first_->received.size() == kMessages &&
           second_->received.size() == kMessages && good_ == 2 * kMessages;
  }));
  // In order: a goodbye may not pass the records before it.
  for (size_t i = 0; i < kMessages; ++i) {
    EXPECT_EQ(first_->received[i].header, std::to_string(i));
    EXPECT_EQ(second_->received[i].header, std::to_string(i));
  }
}

TEST_F(NetworkTest, CountersCountHeadersAndPayloads) {
  const std::string header = content(88, 0);
  const std::string payload = content(1000, 0);
  for (int i = 0; i < 3; ++i) {
    first_->network.send(kSecond, bytesOf(header), bytesOf(payload), count());
  }
  ASSERT_TRUE(drive([&] { return second_->received.size() == 3; }));
  EXPECT_EQ(first_->network.counters().messagesSent, 3);
  EXPECT_EQ(first_->network.counters().bytesSent, 3 * 1088);
  EXPECT_EQ(first_->network.counters().messagesReceived, 0);
  EXPECT_EQ(second_->network.counters().messagesReceived, 3);
  EXPECT_EQ(second_->network.counters().bytesReceived, 3 * 1088);
  EXPECT_EQ(second_->network.counters().bytesSent, 0);
}

TEST_F(NetworkTest, ArmedDescriptorBecomesReadableForAMessage) {
  first_->network.send(kSecond, bytesOf("connects"), {}, count());
  ASSERT_TRUE(drive([&] { return second_->received.size() == 1; }));
  while (!second_->network.arm()) {
    second_->network.progress();
  }
  first_->network.send(kSecond, bytesOf("wakes"), {}, count());
  pollfd it = {second_->network.descriptor(), POLLIN, 0};
  bool readable = false;
  for (int i = 0; i < 1000 && !readable; ++i) {
    first_->network.progress();
    readable = ::poll(&it, 1, 10) == 1;
  }
  EXPECT_TRUE(readable);
  ASSERT_TRUE(drive([&] { return second_->received.size() == 2; }));
}

TEST_F(NetworkTest, SendToAnUnknownProcessIsAnError) {
  EXPECT_THROW(first_->network.send(99, bytesOf("head"), {}, count()), Error);
}

TEST_F(NetworkTest, CloseDeliversWhatWasSent) {
  constexpr int kMessages = 100;
  const std::string payload = content(60000, 2);
  for (int i = 0; i < kMessages; ++i) {
    first_->network.send(
        kSecond, bytesOf(std::to_string(i)), bytesOf(payload), count());
  }
  std::thread closing([&] { first_->close(); });
  const bool all = driveUntil(
      {second_.get()}, [&] { return second_->received.size() == kMessages; });
  closing.join();
  EXPECT_TRUE(all) << second_->received.size();
  EXPECT_EQ(good_, kMessages);
  EXPECT_EQ(bad_, 0);
}

TEST_F(NetworkTest, PeerThatIsGoneIsReportedOnceAndSendsToItFail) {
  first_->network.send(kSecond, bytesOf("connects"), {}, count());
  ASSERT_TRUE(drive([&] { return second_->received.size() == 1; }));
  second_.reset();
  const std::string payload = content(60000, 0);
  ASSERT_TRUE(driveUntil({first_.get()}, [&] {
    if (first_->unreachable.empty()) {
      first_->network.send(kSecond, bytesOf("late"), bytesOf(payload), count());
    }
    return !first_->unreachable.empty();
  }));
  EXPECT_EQ(first_->unreachable.front().first, kSecond);
  EXPECT_FALSE(first_->unreachable.front().second.empty());
  ASSERT_TRUE(driveUntil(
      {first_.get()}, [&] { return first_->network.numPending() == 0; }));
  bad_ = 0;
  first_->network.send(kSecond, bytesOf("too late"), {}, count());
  EXPECT_EQ(bad_, 1);
  driveUntil({first_.get()}, [&] { return true; });
  EXPECT_EQ(first_->unreachable.size(), 1);
}

TEST_F(NetworkTest, AddressWhereNobodyIsAnyMoreIsReported) {
  const std::string address = second_->network.address();
  second_.reset();
  first_->network.addProcess(77, address);
  first_->network.send(77, bytesOf("head"), bytesOf("payload"), count());
  ASSERT_TRUE(
      driveUntil({first_.get()}, [&] { return !first_->unreachable.empty(); }));
  EXPECT_EQ(first_->unreachable.front().first, 77);
  ASSERT_TRUE(driveUntil({first_.get()}, [&] { return good_ + bad_ == 1; }));
  // A new group may try again, and hears of it again.
  first_->network.addProcess(77, address);
  first_->network.send(77, bytesOf("head"), bytesOf("payload"), count());
  EXPECT_TRUE(driveUntil(
      {first_.get()}, [&] { return first_->unreachable.size() == 2; }));
}

TEST_F(NetworkTest, OnePeerLessDoesNotDisturbTheOthers) {
  auto third = std::make_unique<Node>();
  first_->network.addProcess(3, third->network.address());
  first_->network.send(3, bytesOf("connects"), {}, count());
  ASSERT_TRUE(driveUntil({first_.get(), third.get()}, [&] {
    return third->received.size() == 1;
  }));
  third.reset();
  for (int i = 0; i < 200; ++i) {
    first_->network.send(
        kSecond, bytesOf(std::to_string(i)), {}, count(), content(20000, 1));
    if (first_->unreachable.empty()) {
      first_->network.send(3, bytesOf("late"), {}, [](bool) {});
    }
  }
  ASSERT_TRUE(drive([&] {
    return second_->received.size() == 200 && !first_->unreachable.empty();
  }));
  EXPECT_EQ(first_->unreachable.size(), 1);
  EXPECT_EQ(first_->unreachable.front().first, 3);
}

TEST_F(NetworkTest, DescribesItsInterface) {
  const std::string text = first_->network.describe();
  EXPECT_NE(text.find("tcp on lo (127.0.0.1)"), std::string::npos) << text;
}

}  // namespace
}  // namespace automoe
