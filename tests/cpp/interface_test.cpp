// SPDX-License-Identifier: Apache-2.0
// Which network interface is chosen, and what a wrong choice says.
#include "process_group/network/interface.hpp"

#include <gtest/gtest.h>

#include <string>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

TEST(InterfaceTest, TheNamedOneIsTaken) {
  Config config;
  config.interface = "lo";
  config.masterAddress = "192.0.2.1";  // an address for documentation
  const Interface chosen = chooseInterface(config);
  EXPECT_EQ(chosen.name, "lo");
  EXPECT_EQ(chosen.address, "127.0.0.1");
  EXPECT_NE(chosen.reason.find("AUTOMOE_INTERFACE"), std::string::npos);
}

TEST(InterfaceTest, ANamedOneThatIsMissingIsAnErrorThatListsWhatThereIs) {
  Config config;
  config.interface = "nosuch0";
  try {
    chooseInterface(config);
    FAIL() << "no error";
  } catch (const InvalidArgument& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("'nosuch0'"), std::string::npos) << text;
    EXPECT_NE(text.find(" lo"), std::string::npos) << text;
    // Each once, though lo may have an IPv4 and an IPv6 address.
    EXPECT_EQ(text.find(" lo"), text.rfind(" lo")) << text;
  }
}

TEST(InterfaceTest, TheRouteToTheMasterDecides) {
  Config config;
  config.masterAddress = "127.0.0.1";
  const Interface chosen = chooseInterface(config);
  EXPECT_EQ(chosen.name, "lo");
  EXPECT_NE(chosen.reason.find("MASTER_ADDR 127.0.0.1"), std::string::npos);
}

TEST(InterfaceTest, AMasterThatIsNoAddressLeavesTheFirstThatIsUp) {
  Config config;
  config.masterAddress = "no such host";
  const Interface chosen = chooseInterface(config);
  EXPECT_EQ(chosen.name, chooseInterface(Config()).name);
  EXPECT_EQ(chosen.reason.find("MASTER_ADDR"), std::string::npos);
  EXPECT_FALSE(chosen.address.empty());
}

}  // namespace
}  // namespace automoe
