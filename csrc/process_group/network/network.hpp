// SPDX-License-Identifier: Apache-2.0
// Active messages between nodes: a header and a payload, over UCX.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "process_group/common/config.hpp"
#include "process_group/network/interface.hpp"
#include "process_group/network/ucx_handles.hpp"

namespace automoe {

/// What the network tells its owner, always from within progress() or send().
class NetworkListener {
 public:
  virtual ~NetworkListener() = default;
  /// Both spans are valid during the call only.
  virtual void messageArrived(
      std::span<const std::byte> header,
      std::span<const std::byte> payload) = 0;
  /// The connection to a process broke; sends to it have failed.
  virtual void processUnreachable(
      uint64_t process, const std::string& cause) = 0;
};

struct NetworkCounters {
  uint64_t messagesSent = 0;
  uint64_t bytesSent = 0;  // headers and payloads, without TCP/IP and UCX
  uint64_t messagesReceived = 0;
  uint64_t bytesReceived = 0;
};

/// One UCX worker. Endpoints are made at the first message to a process, in
/// peer-error mode (all of them lead to other nodes, so no shared memory is
/// lost by it). Not thread-safe: the engine's lock guards it.
class Network {
 public:
  Network(const Config& config, NetworkListener& listener);
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  /// What other processes pass to addProcess().
  const std::string& address() const { return address_; }
  void addProcess(uint64_t process, const std::string& address);

  using Sent = std::function<void(bool ok)>;
  /// Sends one message. The header is copied; the payload must stay until
  /// `sent` is called, at once or from progress(). `storage`, when given,
  /// holds the payload and is kept until then.
  void send(
      uint64_t process,
      std::span<const std::byte> header,
      std::span<const std::byte> payload,
      Sent sent,
      std::string storage = {});
  /// Messages whose payload is still in use.
  size_t numPending() const { return pending_; }

  /// Moves messages; true when anything happened.
  bool progress();
  /// Readable when progress() has something to do, once arm() was true.
  int descriptor() const { return descriptor_; }
  /// False when there is something to progress first.
  bool arm();

  /// Flushes every connection, or gives up at the deadline, and closes it.
  /// The last call before destruction; the listener may still be called.
  void close(std::chrono::steady_clock::time_point deadline);

  const NetworkCounters& counters() const { return counters_; }
  /// "ucx 1.22.0 tcp on eth0 (10.0.0.3), as it is on the route to ...".
  std::string describe() const;

 private:
  struct Endpoint;
  struct Message;

  Endpoint& endpoint(uint64_t process);
  void closeEndpoint(Endpoint& endpoint);
  void finishRequests(std::chrono::steady_clock::time_point deadline);
  void completed(Message* message, ucs_status_t status);
  static ucs_status_t onMessage(
      void* self,
      const void* header,
      size_t headerBytes,
      void* data,
      size_t bytes,
      const ucp_am_recv_param_t* param);
  static void onError(void* endpoint, ucp_ep_h handle, ucs_status_t status);
  static void onSent(void* request, ucs_status_t status, void* message);

  NetworkListener& listener_;
  const Interface interface_;
  const bool rdma_;
  UcxContext context_;
  UcxWorker worker_;
  std::string address_;
  int descriptor_ = -1;
  std::map<uint64_t, std::unique_ptr<Endpoint>> endpoints_;
  std::vector<Endpoint*> broken_;
  std::vector<void*> requests_;  // of UCX, of flushes and closes
  size_t pending_ = 0;
  NetworkCounters counters_;
};

}  // namespace automoe
