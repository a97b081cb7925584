// SPDX-License-Identifier: Apache-2.0
#include "process_group/flight_recorder.hpp"

#include <c10/util/ApproximateClock.h>
#include <c10/util/thread_name.h>
#include <torch/csrc/profiler/combined_traceback.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <thread>
#include <torch/csrc/distributed/c10d/FlightRecorder.hpp>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/pickle_writer.hpp"

namespace automoe {
namespace {

/// What is kept of some tensors; their storage is not.
struct Shapes {
  explicit Shapes(const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& tensor : tensors) {
      dtypes.push_back(tensor.scalar_type());
      dims.push_back(tensor.dim());
      sizes.append(tensor.sizes().begin(), tensor.sizes().end());
    }
  }

  c10::SmallVector<at::ScalarType, 2> dtypes;
  c10::SmallVector<int64_t, 2> dims;
  /// Of all tensors, one after the other.
  c10::SmallVector<int64_t, 6> sizes;
};

/// "[0, 2]"
std::string rankList(const std::vector<uint64_t>& ranks) {
  std::string text;
  for (const uint64_t rank : ranks) {
    text += (text.empty() ? "" : ", ") + std::to_string(rank);
  }
  return "[" + text + "]";
}

void writeSizes(PickleWriter& out, const Shapes& shapes) {
  const int64_t* size = shapes.sizes.begin();
  out.beginList();
  for (const int64_t dim : shapes.dims) {
    out.beginList();
    for (int64_t i = 0; i < dim; ++i) {
      out.integer(*size++);
    }
    out.endList();
  }
  out.endList();
}

void writeDtypes(PickleWriter& out, const Shapes& shapes) {
  out.beginList();
  for (const at::ScalarType dtype : shapes.dtypes) {
    out.text(c10::toString(dtype));
  }
  out.endList();
}

/// torch::symbolize() asks for frames of code that torch._inductor made, and by
/// that imports it, for seconds, where nobody has: then there are none.
torch::SymbolizedTracebacks namesOf(
    const std::vector<torch::CapturedTraceback*>& tracebacks) {
  const pybind11::gil_scoped_acquire gil;  // nobody sees the stand-in
  const char* name = "_inductor";
  const auto module = pybind11::module_::import("torch");
  const bool absent =
      !pybind11::module_::import("sys").attr("modules").contains(
          "torch._inductor");
  if (absent) {
    module.attr(name) = pybind11::none();
  }
  auto symbols = torch::symbolize(tracebacks);
  if (absent) {
    pybind11::delattr(module, name);
  }
  return symbols;
}

void writeFrames(
    PickleWriter& out,
    const std::vector<torch::unwind::Frame>& all,
    const std::vector<uint64_t>& indices) {
  out.beginList();
  for (const uint64_t index : indices) {
    const torch::unwind::Frame& frame = all.at(index);
    out.beginDict();
    out.text("name");
    out.text(frame.funcname);
    out.text("filename");
    out.text(frame.filename);
    out.text("line");
    out.integer(static_cast<int64_t>(frame.lineno));
    out.endDict();
  }
  out.endList();
}

}  // namespace

struct FlightRecorder::Entry {
  uint64_t id = 0;
  Group* group = nullptr;
  /// The group's, which may change.
  std::string description;
  uint64_t collective = 0;
  uint64_t pointToPoint = 0;
  bool isPointToPoint;
  std::string title;
  Shapes inputs;
  Shapes outputs;
  std::chrono::milliseconds timeout;
  c10::time_t created;
  std::shared_ptr<torch::CapturedTraceback> traceback;
  std::thread::id thread;
  std::string threadName;
  std::optional<c10::time_t> completed = std::nullopt;
  bool retired = false;

  /// Keys and values, without the stack.
  void write(PickleWriter& out) const;
};

void FlightRecorder::Entry::write(PickleWriter& out) const {
  const auto number = [&out](const char* key, auto value) {
    out.text(key);
    out.integer(static_cast<int64_t>(value));
  };
  const auto text = [&out](const char* key, const std::string& value) {
    out.text(key);
    out.text(value);
  };
  number("record_id", id);
  number("pg_id", group->id);
  text("process_group", group->name);
  out.text(description);
  out.pair();
  number("collective_seq_id", collective);
  number("p2p_seq_id", pointToPoint);
  number("op_id", id);
  out.text("is_p2p");
  out.boolean(isPointToPoint);
  text("profiling_name", title);
  text("thread_id", c10::str(thread));
  text("thread_name", threadName);
  out.text("input_sizes");
  writeSizes(out, inputs);
  out.text("input_dtypes");
  writeDtypes(out, inputs);
  out.text("output_sizes");
  writeSizes(out, outputs);
  out.text("output_dtypes");
  writeDtypes(out, outputs);
  number("time_created_ns", created);
  // Nothing waits to be started here, as a kernel does: it runs once posted.
  number("time_discovered_started_ns", created);
  out.text("time_discovered_completed_ns");
  if (completed) {
    out.integer(*completed);
    out.text("duration_ms");
    out.real(static_cast<double>(*completed - created) / 1e6);
  } else {
    out.none();
  }
  text("state", completed ? "completed" : "started");
  out.text("retired");
  out.boolean(retired);
  number("timeout_ms", timeout.count());
}

std::string pointToPointTitle(bool sends, int rank, int peer) {
  return c10::str(
      "automoe:", sends ? "send " : "recv ", rank, sends ? "->" : "<-", peer);
}

void FlightRecord::end(bool completed) const {
  if (recorder_ != nullptr) {
    recorder_->end(id_, completed);
  }
}

// ---- recording ----

FlightRecorder::FlightRecorder(size_t capacity, bool stackOfCpp)
    : capacity_(capacity), stackOfCpp_(stackOfCpp) {}

FlightRecorder::~FlightRecorder() = default;

FlightRecorder& FlightRecorder::instance() {
  // Leaked, as c10d's is: it holds Python frames.
  static auto* recorder = [] {
    const int capacity = c10d::getCvarInt(
        {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"}, 2000);
    const bool stackOfCpp = c10d::getCvarBool(
        {"TORCH_FR_CPP_STACK", "TORCH_NCCL_TRACE_CPP_STACK"}, false);
    return new FlightRecorder(
        static_cast<size_t>(std::max(capacity, 0)), stackOfCpp);
  }();
  return *recorder;
}

FlightRecorder::Group& FlightRecorder::group(const std::string& name) {
  std::unique_ptr<Group>& group = groups_[name];
  if (group == nullptr) {
    group = std::make_unique<Group>();
    group->id = groups_.size() - 1;
    group->name = name;
  }
  return *group;
}

void FlightRecorder::addGroup(
    const std::string& name, const std::vector<uint64_t>& ranks) {
  if (enabled()) {
    const std::lock_guard lock(mutex_);
    group(name).ranks = ranks;
  }
}

FlightRecord FlightRecorder::begin(const FlightCall& call) {
  if (!enabled()) {
    return {};
  }
  std::unique_ptr<Entry> entry(new Entry{
      .description = call.description,
      .isPointToPoint = call.pointToPoint,
      .title = call.title,
      .inputs = Shapes(call.inputs),
      .outputs = Shapes(call.outputs),
      .timeout = call.timeout,
      .created = c10::getTime(),
      .traceback = torch::CapturedTraceback::gather(true, true, stackOfCpp_),
      .thread = std::this_thread::get_id(),
      .threadName = c10::getThreadName()});

  std::unique_ptr<Entry> oldest;  // destroyed without the lock
  const std::lock_guard lock(mutex_);
  Group& group = this->group(call.group);
  group.description = call.description;
  if (call.pointToPoint) {
    group.lastPointToPoint = call.sequence;
  } else {
    group.lastCollective = call.sequence;
    group.lastEnqueued = static_cast<int64_t>(call.sequence);
  }
  entry->id = nextId_++;
  entry->group = &group;
  entry->collective = group.lastCollective;
  entry->pointToPoint = group.lastPointToPoint;
  if (entries_.size() == capacity_) {
    oldest = std::move(entries_.front());
    entries_.pop_front();
  }
  entries_.push_back(std::move(entry));
  return {this, entries_.back()->id};
}

void FlightRecorder::end(uint64_t id, bool completed) {
  const c10::time_t now = c10::getTime();
  const std::lock_guard lock(mutex_);
  if (entries_.empty() || id < entries_.front()->id) {
    return;  // newer ones took its place
  }
  Entry& entry = *entries_[id - entries_.front()->id];
  entry.retired = true;
  if (!completed || entry.completed) {
    return;
  }
  entry.completed = now;
  if (!entry.isPointToPoint) {
    int64_t& last = entry.group->lastCompleted;
    last = std::max(last, static_cast<int64_t>(entry.collective));
  }
}

void FlightRecorder::reset() {
  std::deque<std::unique_ptr<Entry>> forgotten;
  const std::lock_guard lock(mutex_);
  forgotten.swap(entries_);
}

// ---- dumps ----

void FlightRecorder::writeGroups(PickleWriter& out) const {
  out.text("pg_config");
  out.beginDict();
  for (const auto& [name, group] : groups_) {
    out.text(name);
    out.beginDict();
    out.text("name");
    out.text(name);
    out.text("desc");
    out.text(group->description);
    out.text("ranks");
    out.text(rankList(group->ranks));
    out.endDict();
  }
  out.endDict();
  out.text("pg_status");
  out.beginDict();
  for (const auto& [name, group] : groups_) {
    out.text(std::to_string(group->id));
    out.beginDict();
    for (const char* key :
         {"last_enqueued_collective", "last_started_collective"}) {
      out.text(key);
      out.integer(group->lastEnqueued);
    }
    out.text("last_completed_collective");
    out.integer(group->lastCompleted);
    out.endDict();
  }
  out.endDict();
}

std::string FlightRecorder::dump(bool stackTraces, bool onlyActive) const {
  PickleWriter out;
  out.beginDict();
  out.text("version");
  out.text("2.10");
  out.text("comm_lib_version");
  out.text("automoe");
  std::vector<Entry> entries;
  {
    const std::lock_guard lock(mutex_);
    writeGroups(out);
    for (const auto& entry : entries_) {
      if (!onlyActive || !entry->completed) {
        entries.push_back(*entry);
      }
    }
  }
  torch::SymbolizedTracebacks symbols;
  if (stackTraces) {
    std::vector<torch::CapturedTraceback*> tracebacks;
    for (const Entry& entry : entries) {
      tracebacks.push_back(entry.traceback.get());
    }
    symbols = namesOf(tracebacks);
  }
  out.text("entries");
  out.beginList();
  for (size_t i = 0; i < entries.size(); ++i) {
    out.beginDict();
    entries[i].write(out);
    if (stackTraces) {
      out.text("frames");
      writeFrames(out, symbols.all_frames, symbols.tracebacks.at(i));
    }
    out.endDict();
  }
  out.endList();
  out.endDict();
  return out.finish();
}

void FlightRecorder::dumpOnFailure(int globalRank) {
  const bool named =
      !c10d::getCvarString({"TORCH_FR_DUMP_TEMP_FILE"}, "").empty() ||
      !c10d::getCvarString({"TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}, "").empty();
  if (!enabled() || !c10d::getCvarBool({"TORCH_NCCL_DUMP_ON_TIMEOUT"}, named)) {
    return;
  }
  {
    const std::lock_guard lock(dumpMutex_);
    if (dump_ != Dump::kNone) {
      return;  // What fails next fails because of the first.
    }
    dump_ = Dump::kRunning;
  }
  // Not the completion thread, nor the caller's: it needs the GIL, and who has
  // that may never give it back.
  std::thread([this, globalRank] { writeFile(globalRank); }).detach();
}

// Not noexcept: Python ends threads that want the GIL while it exits.
void FlightRecorder::writeFile(int globalRank) {
  try {
    auto& writer = c10d::DebugInfoWriter::getWriter(globalRank);
    writer.write(dump(
        c10d::getCvarBool(c10d::TORCH_INCLUDE_STACK_TRACE, true),
        c10d::getCvarBool(c10d::TORCH_INCLUDE_ONLY_ACTIVE, false)));
    log(LogLevel::kWarn,
        concat(
            "what was posted lately is in ",
            writer.getWriterTarget(),
            "; with those of the other ranks: automoe trace FILES"));
  } catch (const std::exception& error) {
    log(LogLevel::kWarn, concat("no flight record: ", error.what()));
  }
  const std::lock_guard lock(dumpMutex_);
  dump_ = Dump::kWritten;
  dumped_.notify_all();
}

bool FlightRecorder::waitForDump(std::chrono::milliseconds timeout) {
  std::unique_lock lock(dumpMutex_);
  return dumped_.wait_for(
      lock, timeout, [this] { return dump_ != Dump::kRunning; });
}

}  // namespace automoe
