// SPDX-License-Identifier: Apache-2.0
// Ranks as processes, one of which is killed: the others hear which, and
// nothing stays behind. A program of its own, for its processes are forked
// before any engine is made.
#include <gtest/gtest.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "buffers.hpp"
#include "moe_calls.hpp"
#include "process_group/common/file_descriptor.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

/// A store in memory that the forked ranks share.
class SharedStore : public KeyValueStore {
 public:
  SharedStore() {
    void* memory = ::mmap(
        nullptr,
        sizeof(Arena),
        PROT_READ | PROT_WRITE,
        MAP_SHARED | MAP_ANONYMOUS,
        -1,
        0);
    if (memory == MAP_FAILED) {
      throw Error("no memory for a store");
    }
    arena_ = static_cast<Arena*>(memory);
    pthread_mutexattr_t attributes;
    ::pthread_mutexattr_init(&attributes);
    ::pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    ::pthread_mutex_init(&arena_->mutex, &attributes);
    ::pthread_mutexattr_destroy(&attributes);
  }
  ~SharedStore() override { ::munmap(arena_, sizeof(Arena)); }

  void set(const std::string& key, const std::string& value) override {
    const Lock lock(arena_->mutex);
    append(key, value);
  }
  std::vector<std::string> get(const std::vector<std::string>& keys) override {
    std::vector<std::string> found;
    for (const std::string& key : keys) {
      std::string value;
      for (int i = 0; !lookUp(key, value); ++i) {
        if (i == 30000) {
          throw TimeoutError("store: no " + key);
        }
        std::this_thread::sleep_for(milliseconds(1));
      }
      found.push_back(value);
    }
    return found;
  }
  int64_t add(const std::string& key, int64_t amount) override {
    const Lock lock(arena_->mutex);
    std::string value = "0";
    find(key, value);
    value = std::to_string(std::stoll(value) + amount);
    append(key, value);
    return std::stoll(value);
  }

 private:
  struct Arena {
    pthread_mutex_t mutex;
    size_t used;
    char bytes[1 << 20];  // key and value, each with its size before it
  };
  struct Lock {
    explicit Lock(pthread_mutex_t& of) : mutex(of) {
      ::pthread_mutex_lock(&mutex);
    }
    ~Lock() { ::pthread_mutex_unlock(&mutex); }
    pthread_mutex_t& mutex;
  };

  bool lookUp(const std::string& key, std::string& value) {
    const Lock lock(arena_->mutex);
    return find(key, value);
  }
  void append(const std::string& key, const std::string& value) {
    for (const std::string& text : {key, value}) {
      const size_t size = text.size();
      AUTOMOE_CHECK(
          arena_->used + sizeof(size) + size <= sizeof(arena_->bytes), "full");
      std::memcpy(arena_->bytes + arena_->used, &size, sizeof(size));
      arena_->used += sizeof(size);
      std::memcpy(arena_->bytes + arena_->used, text.data(), size);
      arena_->used += size;
    }
  }
  /// The last value of a key.
  bool find(const std::string& key, std::string& value) const {
    bool found = false;
    size_t at = 0;
    const auto next = [&] {
      size_t size;
      std::memcpy(&size, arena_->bytes + at, sizeof(size));
      std::string text(arena_->bytes + at + sizeof(size), size);
      at += sizeof(size) + size;
      return text;
    };
    while (at < arena_->used) {
      const std::string other = next();
      std::string held = next();
      if (other == key) {
        value = std::move(held);
        found = true;
      }
    }
    return found;
  }

  Arena* arena_;
};

enum class Moment {
  kBeforeItsCall,  // the others wait for it in an operation
  kAtWork,         // all exchange large blocks without pause
  kWhileAllIdle,   // the others make their next call afterwards
};

struct Case {
  const char* name;
  Shape shape;
  int victim;
  Moment moment;
  uint64_t bytes;
  bool moe = false;  // plans, dispatches and combines, not all_to_all
};

void PrintTo(const Case& it, std::ostream* out) {
  *out << it.name;
}

/// One end of what two processes say to each other, a line at a time.
class Line {
 public:
  void say(const std::string& text) {
    const std::string line = text + "\n";
    if (::write(out_.get(), line.data(), line.size()) !=
        static_cast<ssize_t>(line.size())) {
      throw Error("the other end of a pipe is gone");
    }
  }
  /// Empty when nothing comes for a minute, or the other side has ended.
  std::string hear() {
    std::string line;
    char byte;
    pollfd it = {in_.get(), POLLIN, 0};
    while (::poll(&it, 1, 60000) == 1 && ::read(in_.get(), &byte, 1) == 1) {
      if (byte == '\n') {
        return line;
      }
      line += byte;
    }
    return "";
  }
  static std::pair<Line, Line> makeBoth() {
    int there[2];
    int back[2];
    if (::pipe(there) != 0 || ::pipe(back) != 0) {
      throw Error("no pipe");
    }
    std::pair<Line, Line> both;
    both.first.in_ = FileDescriptor(back[0]);
    both.first.out_ = FileDescriptor(there[1]);
    both.second.in_ = FileDescriptor(there[0]);
    both.second.out_ = FileDescriptor(back[1]);
    return both;
  }

 private:
  FileDescriptor in_;
  FileDescriptor out_;
};

// ---- the ranks ----

/// Calls until one fails; its error in one line.
std::string untilAFailure(
    Engine& engine, Group& group, const Sizes& sizes, int calls) {
  const std::string text = errorOf<PeerFailedError>([&] {
    for (int call = 0; call < calls; ++call) {
      // Kept: after a failure sends of it may still be under way.
      auto* posted = new Posted(post(group, sizes, call, seconds(60)));
      finish(engine, *posted->operation);
      delete posted;
    }
  });
  return text.substr(0, text.find('\n'));
}

/// The same for rows to experts and back, of `bytes` each.
std::string untilAMoeFailure(Engine& engine, Group& group, uint64_t bytes) {
  const Routing routing = randomRouting(group.topology().size(), 16, 4, 100, 1);
  const std::string text = errorOf<PeerFailedError>([&] {
    while (true) {
      const PlanResult* plan = new PlanResult(makePlan(engine, group, routing));
      auto* call = new MoeCall(
          routing, *plan, group.topology().rank(), bytes / sizeof(float));
      finish(
          engine, *group.dispatch(call->dispatchArguments(), seconds(60), {}));
      finish(
          engine,
          *group.combine(call->combineArguments(true), seconds(60), {}));
      delete call;
      delete plan;
    }
  });
  return text.substr(0, text.find('\n'));
}

void actAsRank(const Case& it, int rank, SharedStore& store, Line& parent) {
  Engine engine(configFor(it.shape, rank));
  const int size = it.shape.size();
  const auto group = joinGroup(engine, store, rank, size, "world", seconds(60));
  const Sizes sizes = equalSizes(size, it.bytes);
  finish(engine, post(*group, sizes));
  parent.say(engine.memoryAddress());
  if (it.moment == Moment::kAtWork) {
    parent.say(
        it.moe ? untilAMoeFailure(engine, *group, it.bytes)
               : untilAFailure(engine, *group, sizes, 1 << 30));
  } else if (rank == it.victim) {
    ::pause();
  } else {
    if (it.moment == Moment::kWhileAllIdle) {
      parent.hear();
    }
    parent.say(untilAFailure(engine, *group, sizes, 1));
  }
  engine.shutdown(seconds(10));
}

/// Files of /dev/shm and /tmp that a process has open or mapped. Programs and
/// libraries may well be installed there.
std::set<std::string> temporaryFilesOf(pid_t pid) {
  std::set<std::string> files;
  const auto take = [&files](const std::string& path) {
    if ((path.starts_with("/dev/shm/") || path.starts_with("/tmp/")) &&
        path.find(".so") == std::string::npos) {
      files.insert(path);
    }
  };
  const std::string process = concat("/proc/", pid);
  std::ifstream maps(process + "/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream words(line);
    std::string range, mode, offset, device, inode, path;
    words >> range >> mode >> offset >> device >> inode >> path;
    if (mode.find('s') != std::string::npos) {
      take(path);
    }
  }
  for (int fd = 3; fd < 1024; ++fd) {
    char path[512];
    const std::string link = concat(process, "/fd/", fd);
    const ssize_t length = ::readlink(link.c_str(), path, sizeof(path));
    if (length > 0) {
      take(std::string(path, static_cast<size_t>(length)));
    }
  }
  return files;
}

bool unixSocketExists(const std::string& name) {
  std::ifstream sockets("/proc/net/unix");
  for (std::string line; std::getline(sockets, line);) {
    if (line.ends_with("@" + name)) {
      return true;
    }
  }
  return false;
}

class KilledRankTest : public ::testing::TestWithParam<Case> {
 protected:
  KilledRankTest() : inherited_(temporaryFilesOf(::getpid())) {
    for (int rank = 0; rank < GetParam().shape.size(); ++rank) {
      start(rank);
    }
  }
  ~KilledRankTest() override {
    for (const pid_t pid : pids_) {
      if (pid > 0) {  // something went wrong
        ::kill(pid, SIGKILL);
        ::waitpid(pid, nullptr, 0);
      }
    }
  }

  void start(int rank) {
    auto [mine, its] = Line::makeBoth();
    const pid_t parent = ::getpid();
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      int status = ::getppid() == parent ? 0 : 1;
      mine = Line();  // so that the parent's end is the only one
      lines_.clear();
      try {
        actAsRank(GetParam(), rank, store_, its);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
        status = 1;
      }
      ::_exit(status);
    }
    pids_.push_back(pid);
    lines_.push_back(std::move(mine));
  }
  /// Its exit status; that of a signal is 128 and its number.
  int reap(size_t rank) {
    int status = -1;
    ::waitpid(std::exchange(pids_[rank], -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  const std::set<std::string> inherited_;
  SharedStore store_;
  std::vector<pid_t> pids_;
  std::vector<Line> lines_;
};

TEST_P(KilledRankTest, IsNamedToAllOthersAndLeavesNothing) {
  const Case& it = GetParam();
  const auto victim = static_cast<size_t>(it.victim);
  std::vector<std::string> addresses;
  for (size_t rank = 0; rank < pids_.size(); ++rank) {
    addresses.push_back(lines_[rank].hear());
    ASSERT_NE(addresses.back(), "") << "rank " << rank << " did not start";
    EXPECT_TRUE(unixSocketExists(addresses.back()));
    EXPECT_EQ(temporaryFilesOf(pids_[rank]), inherited_);
  }
  std::this_thread::sleep_for(milliseconds(50));  // some way into its work
  const pid_t pid = pids_[victim];
  ::kill(pid, SIGKILL);
  EXPECT_EQ(reap(victim), 128 + SIGKILL);
  for (size_t rank = 0; rank < pids_.size(); ++rank) {
    if (rank == victim) {
      continue;
    }
    if (it.moment == Moment::kWhileAllIdle) {
      lines_[rank].say("go");
    }
    const std::string text = lines_[rank].hear();
    expectContains(text, concat("rank ", victim, " "));
    expectContains(text, concat("pid ", pid));
    expectContains(text, "is gone");
    EXPECT_EQ(text.find("another error"), std::string::npos) << text;
    EXPECT_EQ(reap(rank), 0) << "rank " << rank;
  }
  for (const std::string& address : addresses) {
    EXPECT_FALSE(unixSocketExists(address));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases,
    KilledRankTest,
    ::testing::Values(
        Case{"OneNodeWaiting", {{3}}, 1, Moment::kBeforeItsCall, 1000},
        Case{"OneNodeWaitingLarge", {{3}}, 0, Moment::kBeforeItsCall, 300000},
        Case{"OneNodeAtWork", {{3}}, 1, Moment::kAtWork, 2000000},
        Case{"OneNodeStaged", {{3}, false}, 1, Moment::kAtWork, 2000000},
        Case{"OneNodeIdle", {{2}}, 0, Moment::kWhileAllIdle, 1000},
        Case{"TwoNodesWaiting", {{2, 2}}, 3, Moment::kBeforeItsCall, 1000},
        Case{"TwoNodesRelay", {{2, 2}}, 2, Moment::kBeforeItsCall, 20000},
        Case{"TwoNodesAtWork", {{2, 2}}, 1, Moment::kAtWork, 2000000},
        Case{"TwoNodesSmallAtWork", {{2, 2}}, 3, Moment::kAtWork, 100},
        Case{"TwoNodesIdle", {{2, 2}}, 3, Moment::kWhileAllIdle, 1000},
        Case{"AloneOnItsNode", {{2, 1}}, 2, Moment::kBeforeItsCall, 1000},
        Case{"AloneAtWork", {{2, 1}}, 2, Moment::kAtWork, 2000000},
        Case{"LastOfTheLarger", {{3, 1}}, 2, Moment::kBeforeItsCall, 20000},
        Case{"NodesOfOne", {{1, 1, 1}}, 1, Moment::kAtWork, 100000},
        Case{"MoeOnOneNode", {{3}}, 1, Moment::kAtWork, 8000, true},
        Case{"MoeAtWork", {{2, 2}}, 3, Moment::kAtWork, 8000, true},
        Case{"SmallMoeAtWork", {{2, 2}}, 0, Moment::kAtWork, 100, true},
        Case{"MoeOfUnevenNodes", {{1, 3}}, 2, Moment::kAtWork, 4000, true}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace automoe::testing

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
