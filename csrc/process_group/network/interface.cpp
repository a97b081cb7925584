// SPDX-License-Identifier: Apache-2.0
#include "process_group/network/interface.hpp"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <set>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/common/file_descriptor.hpp"

namespace automoe {
namespace {

struct Candidate {
  std::string name;
  std::string address;
  bool loopback;
};

std::string printable(const sockaddr* address, socklen_t size) {
  char text[NI_MAXHOST] = "";
  ::getnameinfo(address, size, text, sizeof(text), nullptr, 0, NI_NUMERICHOST);
  std::string result = text;
  return result.substr(0, result.find('%'));
}

std::vector<Candidate> candidates() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) {
    throw TransportError(concat("getifaddrs: ", strerror(errno)));
  }
  std::vector<Candidate> found;
  for (const ifaddrs* it = list; it != nullptr; it = it->ifa_next) {
    if (it->ifa_addr == nullptr || (it->ifa_flags & IFF_UP) == 0) {
      continue;
    }
    const int family = it->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) {
      continue;
    }
    const socklen_t size =
        family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    found.push_back(
        {it->ifa_name,
         printable(it->ifa_addr, size),
         (it->ifa_flags & IFF_LOOPBACK) != 0});
  }
  ::freeifaddrs(list);
  return found;
}

// The local address that packets to `host` leave from; nothing is sent.
std::optional<std::string> sourceAddress(const std::string& host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* resolved = nullptr;
  if (::getaddrinfo(host.c_str(), "9", &hints, &resolved) != 0) {
    return std::nullopt;
  }
  std::optional<std::string> source;
  for (const addrinfo* it = resolved; it != nullptr && !source.has_value();
       it = it->ai_next) {
    FileDescriptor socket(
        ::socket(it->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (!socket.valid() ||
        ::connect(socket.get(), it->ai_addr, it->ai_addrlen) != 0) {
      continue;
    }
    sockaddr_storage local = {};
    socklen_t size = sizeof(local);
    auto* raw = reinterpret_cast<sockaddr*>(&local);
    if (::getsockname(socket.get(), raw, &size) == 0) {
      source = printable(raw, size);
    }
  }
  ::freeaddrinfo(resolved);
  return source;
}

}  // namespace

Interface chooseInterface(const Config& config) {
  const std::vector<Candidate> all = candidates();
  if (!config.interface.empty()) {
    std::set<std::string> names;  // one interface may have several addresses
    for (const Candidate& it : all) {
      if (it.name == config.interface) {
        return {it.name, it.address, "AUTOMOE_INTERFACE names it"};
      }
      names.insert(it.name);
    }
    std::string list;
    for (const std::string& name : names) {
      list += " " + name;
    }
    throw InvalidArgument(concat(
        "AUTOMOE_INTERFACE is '",
        config.interface,
        "', expected one that is up and has an address:",
        list));
  }
  if (!config.masterAddress.empty()) {
    const auto source = sourceAddress(config.masterAddress);
    for (const Candidate& it : all) {
      if (source.has_value() && it.address == *source) {
        return {
            it.name,
            it.address,
            concat("it is on the route to MASTER_ADDR ", config.masterAddress)};
      }
    }
  }
  for (const Candidate& it : all) {
    if (!it.loopback) {
      return {it.name, it.address, "it is the first that is up"};
    }
  }
  AUTOMOE_CHECK(!all.empty(), "no network interface has an address");
  return {all.front().name, all.front().address, "there is no other"};
}

}  // namespace automoe
