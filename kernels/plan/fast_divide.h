// Division of many 31-bit numbers by the same divisor: multiply-high, add and shift instead of a
// division. Source: Granlund and Montgomery 1994.
#pragma once

#include <cstdint>

#include "normcore/kernels/host_device.h"

namespace normcore::kernels {

class FastDivide {
 public:
  FastDivide() = default;
  // 1 <= divisor < 2^31
  explicit constexpr FastDivide(std::uint32_t divisor) : divisor_(divisor) {
    while ((std::uint64_t{1} << shift_) < divisor) ++shift_;
    const std::uint64_t excess = (std::uint64_t{1} << shift_) - divisor;
    multiplier_ = static_cast<std::uint32_t>((excess << 32) / divisor + 1);
  }

  // value < 2^31
  NORMCORE_HOST_DEVICE constexpr std::uint32_t quotient(std::uint32_t value) const {
    const auto high = static_cast<std::uint32_t>((std::uint64_t{value} * multiplier_) >> 32);
    return (high + value) >> shift_;
  }
  // Any value that is not negative; fast below 2^31.
  NORMCORE_HOST_DEVICE constexpr std::int64_t quotient_of(std::int64_t value) const {
    if (value < std::int64_t{1} << 31) return quotient(static_cast<std::uint32_t>(value));
    return value / divisor_;
  }

 private:
  std::uint32_t multiplier_ = 1, shift_ = 0, divisor_ = 1;
};

}  // namespace normcore::kernels
