// SPDX-License-Identifier: Apache-2.0
#include "process_group/group_registry.hpp"

#include <map>
#include <mutex>
#include <utility>

namespace automoe {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, RegisteredGroup> groups;
};

Registry& registry() {
  // Leaked: groups may be destroyed while the process exits.
  static auto* registry = new Registry();
  return *registry;
}

}  // namespace

void registerGroup(const std::string& name, RegisteredGroup group) {
  const std::lock_guard lock(registry().mutex);
  registry().groups[name] = std::move(group);
}

void unregisterGroup(const std::string& name, const Group* group) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().groups.find(name);
  if (found != registry().groups.end() && found->second.group.get() == group) {
    registry().groups.erase(found);
  }
}

std::optional<RegisteredGroup> findGroup(const std::string& name) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().groups.find(name);
  return found == registry().groups.end() ? std::nullopt
                                          : std::optional(found->second);
}

}  // namespace automoe
