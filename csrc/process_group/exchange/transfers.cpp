// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/transfers.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

// Blocks that are sent side by side, in small turns, and chunks of each under
// way. One block after the other would leave links idle whenever two sources
// meet at one receiver, and much of each under way leaves it to TCP which
// block is finished first. (4 nodes x 2 ranks at 1 gbit, 12.6 MB a rank: 86 %
// of the line rate in rotated order, 93 % with all in the kernel's buffers,
// 98 % in turns with the small send buffer of network.cpp.)
constexpr int kActiveBlocks = 8;
constexpr int kChunksPerBlock = 2;
// A block that is nearly alone has more under way: nobody else fills the link
// until its sender is awake again.
constexpr size_t kFewBlocks = 2;
constexpr int kChunksOfFew = 8;
// Bytes copied between two looks at the network.
constexpr uint64_t kCopyPortion = 256 * 1024;
// Staged chunks of a block: one is filled while the other is read, and both
// are small enough to stay in the cache between the two copies.
constexpr size_t kSlots = 2;

size_t slotBytesOf(const StagedSend& job) {
  return std::max<size_t>(
      std::min<uint64_t>(job.bytes, job.slotBytes), job.largestChunk);
}

// No group of the mate has failed since it posted, so its tensor is there.
bool unchanged(const MateRead& job) {
  return job.mate->segment().header().failures.load() == job.failures;
}

}  // namespace

void Transfers::add(DirectSend job) {
  auto direct = std::make_shared<Direct>();
  static_cast<DirectSend&>(*direct) = std::move(job);
  const auto place =
      std::find_if(directs_.begin(), directs_.end(), [&](const auto& other) {
        return direct->order < other->order;
      });
  directs_.insert(place, std::move(direct));
}

void Transfers::add(MateRead job) {
  reads_.push_back(std::move(job));
}

void Transfers::add(StagedSend job) {
  Staged staged;
  static_cast<StagedSend&>(staged) = std::move(job);
  staged_.push_back(std::move(staged));
}

bool Transfers::advance() {
  const bool sent = advanceDirects();
  const bool staged = advanceStaged();
  const bool read = advanceReads();
  return sent || staged || read;
}

bool Transfers::advanceDirects() {
  bool worked = false;
  int active = 0;
  const int chunks =
      directs_.size() <= kFewBlocks ? kChunksOfFew : kChunksPerBlock;
  for (auto it = directs_.begin(); it != directs_.end();) {
    // A copy keeps the job while the network may call back.
    const std::shared_ptr<Direct> job = *it;
    if (job->operation->finished()) {
      it = directs_.erase(it);
      continue;
    }
    while (job->sent < job->bytes && job->underWay < chunks && sendChunk(job)) {
      worked = true;
    }
    it = job->sent == job->bytes ? directs_.erase(it) : std::next(it);
    // One that has nothing to send yet does not take the turn of others.
    active += job->underWay > 0 ? 1 : 0;
    if (active == kActiveBlocks) {
      break;
    }
  }
  return worked;
}

bool Transfers::sendChunk(const std::shared_ptr<Direct>& job) {
  Record record = job->record;
  std::span<const std::byte> data;
  std::string made;
  if (job->next) {
    if (!job->next(record, chunkBytes_, made)) {
      return false;
    }
    record.bytes = made.size();
  } else {
    record.offset = job->sent;
    record.bytes = std::min<uint64_t>(chunkBytes_, job->bytes - job->sent);
    data = {job->data + job->sent, record.bytes};
  }
  job->sent += record.bytes;
  job->underWay += 1;
  job->operation->pin();
  network_->send(
      job->process,
      asBytes(record),
      data,
      [job](bool ok) {
        job->underWay -= 1;
        const auto operation = job->operation;
        if (ok && job->underWay == 0 && job->sent == job->bytes &&
            !operation->finished()) {
          job->done();
        }
        operation->unpin();
      },
      std::move(made));
  return true;
}

bool Transfers::advanceReads() {
  while (!reads_.empty() && reads_.front().operation->finished()) {
    reads_.pop_front();
  }
  if (reads_.empty()) {
    return false;
  }
  MateRead& job = reads_.front();
  const uint64_t portion = std::min(job.bytes, kCopyPortion);
  try {
    job.mate->read(job.address, job.to, portion);
  } catch (const TransportError& error) {
    const MateRead ended = std::move(job);
    reads_.pop_front();
    ended.failed(unchanged(ended), error.what());
    return true;
  }
  job.address += portion;
  job.to += portion;
  job.bytes -= portion;
  if (job.bytes == 0) {
    const MateRead ended = std::move(job);
    reads_.pop_front();
    ended.done(unchanged(ended));
  }
  return true;
}

bool Transfers::advanceStaged() {
  bool worked = false;
  for (auto it = staged_.begin(); it != staged_.end();) {
    if (!it->operation->finished()) {
      worked = fillSlots(*it) || worked;
    }
    if (it->operation->finished() || it->staged == it->bytes) {
      for (const NodeMemory::Extent& slot : it->slots) {
        NodeMemory::doneReading(memory_.segment(), slot.offset);
      }
      const Staged ended = std::move(*it);
      it = staged_.erase(it);
      if (!ended.operation->finished()) {
        ended.done();
      }
    } else {
      ++it;
    }
  }
  return worked;
}

bool Transfers::fillSlots(Staged& job) {
  if (job.slots.empty()) {
    const size_t slotBytes = slotBytesOf(job);
    for (size_t i = 0; i < kSlots; ++i) {
      // One reader is this job itself, so that the slot stays.
      const auto slot = memory_.allocate(slotBytes, 1);
      if (slot.has_value()) {
        job.slots.push_back(*slot);  // else later: slots become free
      }
    }
  }
  bool worked = false;
  for (const NodeMemory::Extent& slot : job.slots) {
    if (job.staged == job.bytes ||
        NodeMemory::readers(memory_.segment(), slot.offset) != 1) {
      continue;
    }
    Record record = job.record;
    if (job.next) {
      record.bytes = job.next(record, slotBytesOf(job), slot.data);
    } else {
      record.offset = job.staged;
      record.bytes = std::min<uint64_t>(job.slotBytes, job.bytes - job.staged);
      std::memcpy(slot.data, job.data + job.staged, record.bytes);
    }
    record.place = slot.offset;
    job.staged += record.bytes;
    for (Mate* mate : job.mates) {
      NodeMemory::addReader(memory_.segment(), slot.offset);
      mate->post(asBytes(record));
    }
    worked = true;
  }
  return worked;
}

}  // namespace automoe
