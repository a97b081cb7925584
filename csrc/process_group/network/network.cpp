// SPDX-License-Identifier: Apache-2.0
#include "process_group/network/network.hpp"

#include <chrono>
#include <filesystem>
#include <utility>

#include "process_group/common/log.hpp"

namespace automoe {
namespace {

constexpr unsigned kMessageId = 1;

bool haveRdmaDevices() {
  std::error_code error;
  const std::filesystem::directory_iterator it("/sys/class/infiniband", error);
  return !error && it != std::filesystem::directory_iterator();
}

UcxConfig makeConfig(const Interface& interface, bool rdma) {
  ucp_config_t* raw = nullptr;
  // Reads AUTOMOE_UCX_*, so that settings of other users of UCX in this
  // process do not reach ours.
  checkUcx(ucp_config_read("AUTOMOE", nullptr, &raw), "ucp_config_read");
  UcxConfig config(raw);
  const auto set = [&](const char* name, const std::string& value) {
    checkUcx(ucp_config_modify(raw, name, value.c_str()), name);
  };
  set("WARN_UNUSED_ENV_VARS", "n");
  // UCX's rendezvous on TCP queues its replies behind the bulk of the other
  // direction and halves the bandwidth; what is large comes in chunks.
  set("RNDV_THRESH", "inf");
  set("TCP_MAX_NUM_EPS", "16384");
  if (!rdma) {
    // What the kernel holds of one destination goes ahead of the turns of the
    // others. Eight destinations of a rank still fill a link of 25 gbit.
    set("TCP_SNDBUF", "32K");
    set("TLS", "tcp");
    set("NET_DEVICES", interface.name);
  }
  return config;
}

}  // namespace

struct Network::Endpoint {
  Network* network;
  uint64_t process;
  std::string address;
  ucp_ep_h handle = nullptr;
  bool broken = false;
  std::string cause;
};

struct Network::Message {
  Network* network;
  std::string header;
  std::string storage;
  Sent sent;
};

Network::Network(const Config& config, NetworkListener& listener)
    : listener_(listener),
      interface_(chooseInterface(config)),
      rdma_(haveRdmaDevices() && config.interface.empty()) {
  const UcxConfig ucxConfig = makeConfig(interface_, rdma_);
  ucp_params_t params = {};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = "automoe";
  ucp_context_h context = nullptr;
  checkUcx(ucp_init(&params, ucxConfig.get(), &context), "ucp_init");
  context_.reset(context);

  ucp_worker_params_t workerParams = {};
  workerParams.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  workerParams.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  ucp_worker_h worker = nullptr;
  checkUcx(
      ucp_worker_create(context, &workerParams, &worker), "ucp_worker_create");
  worker_.reset(worker);

  ucp_am_handler_param_t handler = {};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID |
                       UCP_AM_HANDLER_PARAM_FIELD_CB |
                       UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.cb = &Network::onMessage;
  handler.arg = this;
  checkUcx(
      ucp_worker_set_am_recv_handler(worker, &handler),
      "ucp_worker_set_am_recv_handler");
  checkUcx(ucp_worker_get_efd(worker, &descriptor_), "ucp_worker_get_efd");

  ucp_address_t* address = nullptr;
  size_t size = 0;
  checkUcx(
      ucp_worker_get_address(worker, &address, &size),
      "ucp_worker_get_address");
  address_.assign(reinterpret_cast<const char*>(address), size);
  ucp_worker_release_address(worker, address);
  log(LogLevel::kInfo, "network: " + describe());
}

Network::~Network() = default;

std::string Network::describe() const {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned patch = 0;
  ucp_get_version(&major, &minor, &patch);
  const std::string version = concat("ucx ", major, ".", minor, ".", patch);
  if (rdma_) {
    return version + " on the RDMA devices of this node";
  }
  return concat(
      version,
      " tcp on ",
      interface_.name,
      " (",
      interface_.address,
      "), as ",
      interface_.reason);
}

void Network::addProcess(uint64_t process, const std::string& address) {
  std::unique_ptr<Endpoint>& endpoint = endpoints_[process];
  if (endpoint == nullptr) {
    endpoint = std::make_unique<Endpoint>();
    endpoint->network = this;
    endpoint->process = process;
    endpoint->address = address;
  }
  // A new group is a new try.
  endpoint->broken = endpoint->broken && endpoint->handle != nullptr;
}

Network::Endpoint& Network::endpoint(uint64_t process) {
  const auto found = endpoints_.find(process);
  AUTOMOE_CHECK(found != endpoints_.end(), "no address of process ", process);
  Endpoint& endpoint = *found->second;
  if (endpoint.handle == nullptr && !endpoint.broken) {
    ucp_ep_params_t params = {};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                        UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address =
        reinterpret_cast<const ucp_address_t*>(endpoint.address.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &Network::onError;
    params.err_handler.arg = &endpoint;
    const ucs_status_t status =
        ucp_ep_create(worker_.get(), &params, &endpoint.handle);
    if (status != UCS_OK) {
      endpoint.handle = nullptr;
      onError(&endpoint, nullptr, status);
    }
  }
  return endpoint;
}

void Network::send(
    uint64_t process,
    std::span<const std::byte> header,
    std::span<const std::byte> payload,
    Sent sent,
    std::string storage) {
  Endpoint& to = endpoint(process);
  if (to.broken) {
    sent(false);
    return;
  }
  auto message = std::make_unique<Message>();
  message->network = this;
  message->header.assign(
      reinterpret_cast<const char*>(header.data()), header.size());
  message->sent = std::move(sent);
  message->storage = std::move(storage);
  if (!message->storage.empty()) {
    payload = std::as_bytes(std::span(message->storage));
  }
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                       UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = &Network::onSent;
  param.user_data = message.get();
  counters_.messagesSent += 1;
  counters_.bytesSent += header.size() + payload.size();
  pending_ += 1;
  const ucs_status_ptr_t request = ucp_am_send_nbx(
      to.handle,
      kMessageId,
      message->header.data(),
      message->header.size(),
      payload.data(),
      payload.size(),
      &param);
  if (UCS_PTR_IS_PTR(request)) {
    (void)message.release();  // onSent() owns it now
    return;
  }
  completed(message.release(), UCS_PTR_STATUS(request));
}

void Network::completed(Message* raw, ucs_status_t status) {
  const std::unique_ptr<Message> message(raw);
  pending_ -= 1;
  message->sent(status == UCS_OK);
}

void Network::onSent(void* request, ucs_status_t status, void* message) {
  auto* typed = static_cast<Message*>(message);
  typed->network->completed(typed, status);
  ucp_request_free(request);
}

ucs_status_t Network::onMessage(
    void* self,
    const void* header,
    size_t headerBytes,
    void* data,
    size_t bytes,
    const ucp_am_recv_param_t* param) {
  auto& network = *static_cast<Network*>(self);
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
    log(LogLevel::kWarn, "dropped a rendezvous message: we never send one");
    return UCS_OK;
  }
  network.counters_.messagesReceived += 1;
  network.counters_.bytesReceived += headerBytes + bytes;
  try {
    network.listener_.messageArrived(
        {static_cast<const std::byte*>(header), headerBytes},
        {static_cast<const std::byte*>(data), bytes});
  } catch (const std::exception& error) {
    // C frames of UCX are on the stack: nothing may pass through them.
    log(LogLevel::kWarn, concat("dropped a message: ", error.what()));
  }
  return UCS_OK;
}

void Network::onError(void* arg, ucp_ep_h, ucs_status_t status) {
  auto& endpoint = *static_cast<Endpoint*>(arg);
  endpoint.broken = true;
  endpoint.cause = ucs_status_string(status);
  endpoint.network->broken_.push_back(&endpoint);
}

bool Network::progress() {
  bool worked = false;
  // TCP is polled in small portions; a bound keeps the mailboxes served.
  for (int i = 0; i < 16 && ucp_worker_progress(worker_.get()) != 0; ++i) {
    worked = true;
  }
  while (!broken_.empty()) {
    // The first that broke is at fault: others may have left because of it.
    Endpoint& endpoint = *broken_.front();
    broken_.erase(broken_.begin());
    worked = true;
    closeEndpoint(endpoint);
    listener_.processUnreachable(endpoint.process, endpoint.cause);
  }
  return worked;
}

bool Network::arm() {
  const ucs_status_t status = ucp_worker_arm(worker_.get());
  if (status != UCS_ERR_BUSY) {
    checkUcx(status, "ucp_worker_arm");
  }
  return status == UCS_OK;
}

void Network::closeEndpoint(Endpoint& endpoint) {
  if (endpoint.handle == nullptr) {
    return;
  }
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(endpoint.handle, &param);
  endpoint.handle = nullptr;
  endpoint.broken = true;
  if (UCS_PTR_IS_PTR(request)) {
    requests_.push_back(request);
  }
}

void Network::finishRequests(std::chrono::steady_clock::time_point deadline) {
  do {
    ucp_worker_progress(worker_.get());
    std::erase_if(requests_, [](void* request) {
      if (ucp_request_check_status(request) == UCS_INPROGRESS) {
        return false;
      }
      ucp_request_free(request);
      return true;
    });
  } while ((!requests_.empty() || pending_ > 0) &&
           std::chrono::steady_clock::now() < deadline);
}

void Network::close(std::chrono::steady_clock::time_point deadline) {
  // What is complete for the sender may still lie in UCX's own buffers.
  const ucp_request_param_t param = {};
  const ucs_status_ptr_t flush = ucp_worker_flush_nbx(worker_.get(), &param);
  if (UCS_PTR_IS_PTR(flush)) {
    requests_.push_back(flush);
  }
  finishRequests(deadline);
  for (const auto& [process, endpoint] : endpoints_) {
    closeEndpoint(*endpoint);
  }
  // A forced close completes by itself, and everything pending with it.
  finishRequests(deadline + std::chrono::milliseconds(100));
  for (void* request : requests_) {
    ucp_request_free(request);
  }
  requests_.clear();
}

}  // namespace automoe
