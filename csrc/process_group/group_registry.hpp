// SPDX-License-Identifier: Apache-2.0
// The groups of this process by the name that c10d has given them: also where
// c10d has wrapped the backend (TORCH_DISTRIBUTED_DEBUG=DETAIL).
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/options_automoe.hpp"

namespace automoe {

struct RegisteredGroup {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<Group> group;
  /// Of the backend: they hold its default timeout.
  c10::intrusive_ptr<OptionsAutoMoe> options;
};

/// A later group takes the name over.
void registerGroup(const std::string& name, RegisteredGroup group);
/// Does nothing when the name belongs to another group by now.
void unregisterGroup(const std::string& name, const Group* group);
std::optional<RegisteredGroup> findGroup(const std::string& name);

}  // namespace automoe
