// Shared memory of an emulated block: its bytes, and how many of them a launch may have.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

// Starts as NaN bytes, ends as NaN bytes for a peer that reads too late.
class SharedArray {
 public:
  explicit SharedArray(std::size_t bytes)
      : bytes_(bytes), memory_(bytes + 2 * kCanary, kCanaryByte) {
    clear();
  }
  unsigned char* data() { return memory_.data() + kCanary; }
  void clear() { std::memset(data(), 0xff, bytes_); }
  bool is_intact() const {
    const auto is_canary = [](unsigned char byte) { return byte == kCanaryByte; };
    return std::all_of(memory_.begin(), memory_.begin() + kCanary, is_canary) &&
           std::all_of(memory_.end() - kCanary, memory_.end(), is_canary);
  }
  // The offset of a pointer into the array.
  std::optional<std::size_t> find(const void* pointer) {
    const auto* const byte = static_cast<const unsigned char*>(pointer);
    if (byte < data() || byte > data() + bytes_) return std::nullopt;
    return byte - data();
  }

 private:
  static constexpr std::size_t kCanary = 256;  // bytes on both sides
  static constexpr unsigned char kCanaryByte = 0x5a;

  std::size_t bytes_;
  std::vector<unsigned char> memory_;
};

// What is wrong with a launch if its kernel has that much static shared memory; a device refuses it,
// here only the memory that threads get to counts.
inline std::string excess_of_shared(const Launch& launch, std::size_t static_bytes) {
  const bool asks = launch.max_dynamic_shared != 0;
  const std::size_t dynamic = asks ? launch.max_dynamic_shared : launch.dynamic_shared;
  const std::size_t limit = asks ? kOptInShared : kDefaultShared;
  std::ostringstream text;
  if (launch.dynamic_shared > dynamic) {
    text << "shared memory: " << launch.dynamic_shared << " dynamic bytes, asked for " << dynamic;
  } else if (static_bytes > launch.max_static_shared) {
    text << "shared memory: " << static_bytes << " static bytes, the launch expects up to "
         << launch.max_static_shared;
  } else if (static_bytes + dynamic > limit) {
    text << "shared memory: " << static_bytes << " static and " << dynamic
         << " dynamic bytes, more than " << limit << (asks ? "" : " without asking for it");
  }
  return text.str();
}

}  // namespace emulator
