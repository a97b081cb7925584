// SPDX-License-Identifier: Apache-2.0
// Strangers at the unix socket where node-mates meet: nothing they send may
// crash the listener, hold it, or stay with it.
#include "process_group/memory/handshake.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/memory/node_memory.hpp"
#include "processes.hpp"

namespace automoe {
namespace {

using testing::newProcess;

using Clock = std::chrono::steady_clock;

const uint64_t kProcess = newProcess();
const uint64_t kStranger = newProcess();
constexpr size_t kBytes = size_t{1} << 22;
constexpr size_t kRing = 4096;

Config smallMemory() {
  Config config;
  config.nodeMemoryBytes = kBytes;
  return config;
}

std::ptrdiff_t openDescriptors() {
  const std::filesystem::directory_iterator fds("/proc/self/fd");
  return std::distance(begin(fds), end(fds));
}

/// What the listener holds of its visitors.
struct Holdings {
  std::ptrdiff_t descriptors;
  size_t watched;
  size_t bytes;
  bool operator==(const Holdings&) const = default;
};

void PrintTo(const Holdings& it, std::ostream* out) {
  *out << it.descriptors << " descriptors, " << it.watched << " watched, "
       << it.bytes << " bytes";
}

class HandshakeTest : public ::testing::Test {
 protected:
  /// A good first message, and what it carries.
  HandshakeTest()
      : memory_(kProcess, smallMemory()),
        mine_(Segment::create(kStranger, kBytes)),
        doorbell_(::eventfd(0, EFD_CLOEXEC)),
        hello_(makeHello(kStranger, mine_, Segment::kHeaderBytes, kRing)),
        before_(holdings()) {}

  Holdings holdings() const {
    return {
        openDescriptors(),
        memory_.descriptors().size(),
        memory_.allocatedBytes()};
  }
  FileDescriptor connect() {
    return connectTo(
        memory_.address(), Clock::now() + std::chrono::seconds(10));
  }
  /// Takes every step that can be taken now.
  std::unique_ptr<Mate> step() {
    std::unique_ptr<Mate> met;
    for (bool more = true; more;) {
      std::vector<pollfd> fds;
      for (const int fd : memory_.descriptors()) {
        if (fd != memory_.doorbell()) {
          fds.push_back({fd, POLLIN, 0});
        }
      }
      more = ::poll(fds.data(), fds.size(), 0) > 0;
      for (const pollfd& it : fds) {
        if (it.revents != 0) {
          if (auto mate = memory_.handle(it.fd)) {
            met = std::move(mate);
          }
        }
      }
    }
    return met;
  }
  /// `talk` with the listener leads to no mate and leaves nothing behind.
  void expectRefused(const std::function<void(int socket)>& talk) {
    {
      const FileDescriptor socket = connect();
      ASSERT_TRUE(socket.valid());
      EXPECT_TRUE(step() == nullptr);
      talk(socket.get());
      EXPECT_TRUE(step() == nullptr);
    }
    EXPECT_TRUE(step() == nullptr);
    EXPECT_EQ(holdings(), before_);
  }
  void sendBytes(int socket, const void* data, size_t size) {
    EXPECT_EQ(
        ::send(socket, data, size, MSG_NOSIGNAL), static_cast<ssize_t>(size));
  }
  void sendGood(int socket) {
    sendHello(socket, hello_, mine_.fd(), doorbell_.get());
  }
  /// Any number of descriptors with a hello.
  void sendWith(int socket, const std::vector<int>& fds) {
    iovec data = {&hello_, sizeof(hello_)};
    std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
    msghdr message = {};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(head), fds.data(), fds.size() * sizeof(int));
    ASSERT_GT(::sendmsg(socket, &message, MSG_NOSIGNAL), 0);
  }

  NodeMemory memory_;
  Segment mine_;
  FileDescriptor doorbell_;
  Hello hello_;
  const Holdings before_;
};

// First of all: the good conversation is accepted, so that what is refused
// below is refused for its fault.
TEST_F(HandshakeTest, GoodConversationMakesAMate) {
  const FileDescriptor socket = connect();
  step();
  sendGood(socket.get());
  step();
  const OpenedMate opened = receiveHello(socket.get(), true);
  EXPECT_EQ(opened.hello.process, kProcess);
  EXPECT_EQ(opened.hello.proofRead, mine_.header().proof);
  Hello last = hello_;
  last.proofRead = opened.segment->header().proof;
  sendHello(socket.get(), last, -1, -1);
  const auto mate = step();
  ASSERT_NE(mate, nullptr);
  EXPECT_EQ(mate->description().process, kStranger);
  EXPECT_FALSE(mate->description().readsUs);
}

TEST_F(HandshakeTest, SilenceIsForgottenWhenItEnds) {
  expectRefused([](int) {});
}

TEST_F(HandshakeTest, MessagesOfAnyOtherLengthAreRefused) {
  const std::string zeros(4096, '\0');
  for (const size_t size :
       {size_t{0}, size_t{1}, size_t{8}, sizeof(Hello) - 1, zeros.size()}) {
    expectRefused([&](int socket) { sendBytes(socket, zeros.data(), size); });
  }
  expectRefused(
      [&](int socket) { sendBytes(socket, &hello_, sizeof(hello_) - 8); });
}

TEST_F(HandshakeTest, AnotherMagicNumberIsRefused) {
  hello_.magic += 1;
  expectRefused([&](int socket) { sendGood(socket); });
}

TEST_F(HandshakeTest, HelloWithoutDescriptorsIsRefused) {
  expectRefused([&](int socket) { sendHello(socket, hello_, -1, -1); });
}

TEST_F(HandshakeTest, HelloWithAnyOtherNumberOfDescriptorsIsRefused) {
  for (const size_t count : {1, 3, 10, 200}) {
    expectRefused([&](int socket) {
      std::vector<int> fds(count, doorbell_.get());
      sendWith(socket, fds);
    });
  }
}

TEST_F(HandshakeTest, DescriptorsThatAreNoMemoryAreRefused) {
  const FileDescriptor null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  const Holdings before = holdings();
  for (const int fd : {doorbell_.get(), null.get()}) {
    {
      const FileDescriptor socket = connect();
      step();
      sendHello(socket.get(), hello_, fd, fd);
      EXPECT_TRUE(step() == nullptr);
    }
    step();
    EXPECT_EQ(holdings(), before);
  }
}

TEST_F(HandshakeTest, SegmentThatIsNotAsDescribedIsRefused) {
  hello_.segmentBytes = kBytes / 2;
  expectRefused([&](int socket) { sendGood(socket); });
  hello_.segmentBytes = ~uint64_t{0};
  expectRefused([&](int socket) { sendGood(socket); });
  hello_.segmentBytes = 0;
  expectRefused([&](int socket) { sendGood(socket); });
  hello_.segmentBytes = kBytes;
  hello_.process = kStranger + 1;
  expectRefused([&](int socket) { sendGood(socket); });
}

TEST_F(HandshakeTest, MailboxOfAnAbsurdSizeIsRefused) {
  for (const uint64_t bytes :
       {uint64_t{0},
        uint64_t{8},
        uint64_t{512},
        uint64_t{3000},
        uint64_t{kBytes},
        uint64_t{1} << 40,
        uint64_t{1} << 63,
        ~uint64_t{0}}) {
    hello_.ringBytes = bytes;
    expectRefused([&](int socket) {
      sendGood(socket);
      step();
      Hello last = hello_;
      last.proofRead = memory_.segment().header().proof;
      // The listener may have hung up already.
      (void)!::send(socket, &last, sizeof(last), MSG_NOSIGNAL);
    });
  }
}

TEST_F(HandshakeTest, MailboxAtAnAbsurdPlaceIsRefused) {
  for (const uint64_t offset :
       {uint64_t{kBytes},
        uint64_t{kBytes - kRing},  // its header does not fit
        uint64_t{1} << 63,
        ~uint64_t{0},
        ~uint64_t{0} - kRing - Ring::kHeaderBytes + 1,  // the sum wraps
        uint64_t{Segment::kHeaderBytes + 3},  // atomics need alignment
        uint64_t{0}}) {                       // the segment's header
    hello_.ringOffset = offset;
    expectRefused([&](int socket) {
      sendGood(socket);
      step();
      Hello last = hello_;
      last.proofRead = memory_.segment().header().proof;
      (void)!::send(socket, &last, sizeof(last), MSG_NOSIGNAL);
    });
  }
}

TEST_F(HandshakeTest, WhoCannotReadOurMemoryIsRefused) {
  expectRefused([&](int socket) {
    sendGood(socket);
    step();
    Hello last = hello_;
    last.proofRead = memory_.segment().header().proof + 1;
    sendHello(socket, last, -1, -1);
  });
}

TEST_F(HandshakeTest, WhoStopsAfterTheFirstMessageIsForgotten) {
  expectRefused([&](int socket) { sendGood(socket); });
}

TEST_F(HandshakeTest, DescriptorsWithTheConfirmationAreRefusedAndClosed) {
  expectRefused([&](int socket) {
    sendGood(socket);
    step();
    hello_.proofRead = memory_.segment().header().proof;
    sendWith(socket, {doorbell_.get(), doorbell_.get()});
  });
}

TEST_F(HandshakeTest, ManyHalfOpenConnectionsDoNotKeepMatesOut) {
  std::vector<FileDescriptor> strangers;
  for (int i = 0; i < 200; ++i) {
    strangers.push_back(connect());
    ASSERT_TRUE(strangers.back().valid());
    if (i % 5 == 0) {
      sendGood(strangers.back().get());
    }
    step();
  }
  {
    NodeMemory other(kStranger + 5, smallMemory());
    std::unique_ptr<Mate> atOther;
    std::thread connector([&] {
      atOther = other.connect(
          kProcess, memory_.address(), Clock::now() + std::chrono::seconds(20));
    });
    std::unique_ptr<Mate> met;
    const auto deadline = Clock::now() + std::chrono::seconds(20);
    while (met == nullptr && Clock::now() < deadline) {
      met = step();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    connector.join();
    ASSERT_NE(met, nullptr);
    ASSERT_NE(atOther, nullptr);
    EXPECT_EQ(met->description().process, kStranger + 5);
  }
  strangers.clear();
  step();
  EXPECT_EQ(memory_.descriptors().size(), before_.watched);
  EXPECT_EQ(openDescriptors(), before_.descriptors);
}

TEST(HandshakeEndTest, ListenerMayEndInTheMiddleOfConversations) {
  const Segment mine = Segment::create(kStranger, kBytes);
  const FileDescriptor doorbell(::eventfd(0, EFD_CLOEXEC));
  std::vector<FileDescriptor> strangers;
  {
    NodeMemory memory(kProcess, smallMemory());
    for (int i = 0; i < 10; ++i) {
      strangers.push_back(
          connectTo(memory.address(), Clock::now() + std::chrono::seconds(10)));
      if (i % 2 == 0) {
        sendHello(
            strangers.back().get(),
            makeHello(kStranger, mine, Segment::kHeaderBytes, kRing),
            mine.fd(),
            doorbell.get());
      }
      for (int step = 0; step < 2; ++step) {
        for (const int fd : memory.descriptors()) {
          pollfd it = {fd, POLLIN, 0};
          if (fd != memory.doorbell() && ::poll(&it, 1, 0) == 1) {
            EXPECT_TRUE(memory.handle(fd) == nullptr);
          }
        }
      }
    }
    EXPECT_EQ(memory.descriptors().size(), 12);
    EXPECT_GT(memory.allocatedBytes(), 5 * 64 * 1024);
  }
  // Every visitor sees the end, after the answer if it got one.
  for (const FileDescriptor& it : strangers) {
    char text[512];
    ssize_t got = 0;
    while ((got = ::recv(it.get(), text, sizeof(text), 0)) > 0) {
    }
    EXPECT_EQ(got, 0);
  }
}

TEST_F(HandshakeTest, ListenerThatAnswersNonsenseIsAnError) {
  const std::string address = concat("automoe-test-", kStranger);
  const FileDescriptor listener = listenAt(address);
  std::thread stranger([&] {
    const FileDescriptor socket = acceptFrom(listener.get());
    // It gives up after a second, and the other one may be slow.
    pollfd ready{.fd = socket.get(), .events = POLLIN, .revents = 0};
    EXPECT_EQ(::poll(&ready, 1, 20'000), 1);
    char text[512];
    EXPECT_GT(::recv(socket.get(), text, sizeof(text), 0), 0);
    sendBytes(socket.get(), "nonsense", 8);
  });
  EXPECT_THROW(
      memory_.connect(
          kStranger, address, Clock::now() + std::chrono::seconds(20)),
      TransportError);
  stranger.join();
  EXPECT_EQ(memory_.allocatedBytes(), before_.bytes);
}

}  // namespace
}  // namespace automoe
