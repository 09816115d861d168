// The fixture of module tests, and modules as archives and as text.
#pragma once

#include <gtest/gtest.h>
#include <normcore/normcore.h>
#include <torch/serialize.h>

#include <sstream>
#include <string>

#include "reference.h"

namespace normcore::testing {

class Modules : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

template <class Module>
std::string saved(const Module& module) {
  std::ostringstream stream;
  torch::save(module, stream);
  return stream.str();
}

template <class Module>
void load(Module& module, const std::string& archive) {
  std::istringstream stream(archive);
  torch::load(module, stream);
}

template <class Module>
std::string printed(const Module& module) {
  std::ostringstream stream;
  stream << module;
  return stream.str();
}

}  // namespace normcore::testing
