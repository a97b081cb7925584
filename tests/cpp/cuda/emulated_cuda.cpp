// SPDX-License-Identifier: Apache-2.0
#include "cuda/emulated_cuda.hpp"

#include <atomic>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/emulated_launch.hpp"

namespace automoe::emulated {

constinit thread_local Index threadIdx;
constinit thread_local Index blockIdx;
constinit thread_local Index blockDim;
constinit thread_local Index gridDim;

namespace {

constexpr unsigned kMostThreads = 1024;

std::atomic<uint64_t> seedOfAll = 1;
std::atomic<uint64_t> launches = 0;
std::atomic<uint64_t> launchesOfSeed = 0;
std::atomic<uint64_t> unloadedLaunches = 0;
std::mutex loadedMutex;
std::set<const void*> loaded;  // guarded by loadedMutex

constinit thread_local Launch* running = nullptr;

Launch& launchOfThread() {
  if (running == nullptr) {
    throw std::runtime_error(
        "code of a CUDA thread is called outside of run()");
  }
  return *running;
}

}  // namespace

void setSeed(uint64_t seed) {
  seedOfAll = seed;
  launchesOfSeed = 0;
}

uint64_t countLaunches() {
  return launches;
}

uint64_t countUnloadedLaunches() {
  return unloadedLaunches;
}

void unloadKernels() {
  const std::lock_guard lock(loadedMutex);
  loaded.clear();
}

std::vector<KnownKernel>& knownKernels() {
  static std::vector<KnownKernel> all;
  return all;
}

void load(const void* kernel) {
  const std::lock_guard lock(loadedMutex);
  loaded.insert(kernel);
}

void launching(const void* kernel) {
  const std::lock_guard lock(loadedMutex);
  unloadedLaunches += loaded.insert(kernel).second ? 1 : 0;
}

void run(
    const char* name,
    unsigned gridBlocks,
    unsigned blockThreads,
    size_t sharedBytes,
    const std::function<void()>& body) {
  constexpr size_t kMostShared = size_t{48} << 10;
  if (gridBlocks == 0 || blockThreads == 0 || blockThreads > kMostThreads ||
      sharedBytes > kMostShared) {
    throw std::runtime_error(
        std::string(name) + " is launched with " + std::to_string(gridBlocks) +
        " blocks of " + std::to_string(blockThreads) + " threads and " +
        std::to_string(sharedBytes) +
        " bytes, expected at least 1 block, 1 to 1024 threads and at most "
        "49152 bytes");
  }
  launches += 1;
  const uint64_t number = launchesOfSeed.fetch_add(1);
  Launch launch(
      name, blockThreads, sharedBytes, body, seedOfAll * 1000003 + number);
  Launch* const before = std::exchange(running, &launch);
  gridDim.x = gridBlocks;
  blockDim.x = blockThreads;
  std::vector<unsigned> order(gridBlocks);
  std::iota(order.begin(), order.end(), 0U);
  launch.random().shuffle(order);
  try {
    for (const unsigned block : order) {
      launch.runBlock(block);
    }
  } catch (...) {
    running = before;
    throw;
  }
  running = before;
}

void fail(const std::string& what) {
  launchOfThread().fail(what);
}

void pause() {
  launchOfThread().pause();
}

void* shareArray(const void* tag, size_t bytes) {
  return launchOfThread().shareArray(tag, bytes);
}

std::byte* dynamicShared() {
  return launchOfThread().dynamicShared();
}

uint64_t meetWarp(
    WarpCall call, unsigned mask, uint64_t value, unsigned lane, Site site) {
  return launchOfThread().meetWarp(call, mask, value, lane, site);
}

void meetBlock(Site site) {
  launchOfThread().meetBlock(site);
}

}  // namespace automoe::emulated
