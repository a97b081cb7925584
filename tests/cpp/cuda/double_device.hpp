// SPDX-License-Identifier: Apache-2.0
// A test double of Device and DeviceNetwork for ranks that are threads of one
// process. Nothing runs when it is enqueued: one thread takes the work of all
// streams of all ranks in an order that the seed draws among all that devices
// may choose, so that a missing event, a flag or a too early reuse shows as
// wrong bytes, and a cyclic wait as a text instead of a hang.
//
// What it checks: copies, clears, flags and transfers stay inside of memory
// that lives and is the rank's own or open in it. What kernels touch is not
// checked (under ASan: only that it is not freed).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "process_group/device/device.hpp"

namespace automoe::testing {

class DoubleGraph;

/// Outlives the devices and networks that it makes. Thread-safe.
class DoubleWorld {
 public:
  struct Statistics {
    uint64_t enqueued = 0;        // calls, those that threw included
    uint64_t items = 0;           // that are done
    uint64_t copiedBytes = 0;     // by copy()
    uint64_t sentBytes = 0;       // by exchange()
    uint64_t synchronized = 0;    // calls of synchronize()
    uint64_t freed = 0;           // calls of free(): each waits for the device
    uint64_t pageableCopies = 0;  // which CUDA stages, and may wait for
  };

  DoubleWorld(int size, unsigned seed);
  ~DoubleWorld();

  /// Several devices of one rank are the same device.
  std::unique_ptr<Device> makeDevice(int rank);
  /// `ranks` are those of the group, in its order, `rank` is one of them. The
  /// n-th network of a rank meets the n-th ones of the others that have the
  /// same ranks and name.
  std::unique_ptr<DeviceNetwork> makeNetwork(
      int rank, const std::vector<int>& ranks, const std::string& name = "");

  /// Memory of the test becomes memory of the device: tensors of the user.
  void adopt(int rank, void* memory, size_t bytes);
  void disown(int rank, void* memory);

  /// The rank's n-th call that enqueues (1 is its first) throws DeviceError, or
  /// an error that is none of ours.
  void failAt(int rank, uint64_t n, bool foreign = false);
  /// So do the rank's next `times` calls of that method; allocate() finds the
  /// device full. With "transfer" the next exchanges are enqueued, but break up
  /// when they run, which failure() tells.
  void failCalls(int rank, const std::string& method, int times);
  /// What the stream gets is recorded until endCapture(), as in CUDA's relaxed
  /// mode. Await takes other streams into the capture, and the stream that
  /// began it awaits them again.
  void beginCapture(int rank, Device::Stream stream);
  std::shared_ptr<DoubleGraph> endCapture(int rank, Device::Stream stream);
  /// Enqueues what was recorded, as often as the test likes. Two launches of a
  /// graph do not overlap, whatever their streams.
  void launch(const std::shared_ptr<DoubleGraph>& graph, Device::Stream stream);
  /// What the rank enqueues counts as captured, though it runs as it does.
  void setCapturing(int rank, bool capturing);
  /// The rank's streams stop, as those of a device that hangs.
  void stall(int rank);
  void resume(int rank);
  /// How long a world that cannot move is waited for (10 s) by synchronize(),
  /// which then throws, and by free(), which then goes on.
  void setPatience(std::chrono::milliseconds patience);

  /// Waits until no item can run: all are done, or deadlocked() has a text.
  void settle();
  /// What the head of each stream waits for, if none can run but some are not
  /// empty; else nothing.
  std::string deadlocked() const;
  /// What methods that do not throw and work that ran found wrong. After work
  /// of a rank failed, all its calls throw, as CUDA's do.
  std::vector<std::string> errors() const;
  /// What the rank has not freed, closed or destroyed.
  std::vector<std::string> leaks(int rank) const;
  Statistics statistics(int rank) const;

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace automoe::testing
