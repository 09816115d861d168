// Plain descriptions of tensors that cross the border between the torch layer and the kernels.
// Every tensor is dense; its element order is one of two layouts over an Extent {n, c, s}:
//   kNCS  x[n][c][s]: channels outside, positions contiguous (NCHW, any axis but the last)
//   kNSC  x[n][s][c]: channels contiguous (NHWC, channels_last, rows x features)
// Any extent may be 0 (then nothing is read or written). Pointers need only the alignment of their
// element. Nothing here owns memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace normcore::kernels {

enum class DType : std::uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

// Type in which a norm of `dtype` values is computed: float64 for float64, float32 for all others.
constexpr DType compute_type(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

enum class Layout : std::uint8_t { kNCS, kNSC };

struct Extent {
  std::int64_t n = 0, c = 0, s = 0;
  constexpr std::int64_t numel() const { return n * c * s; }
};

struct ConstTensor {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  explicit constexpr operator bool() const { return data != nullptr; }
};

struct MutableTensor {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::kFloat32;
  explicit constexpr operator bool() const { return data != nullptr; }
  constexpr operator ConstTensor() const { return {data, dtype}; }
};

// Which elements count for the statistics (true counts). One byte per entry, 0 or 1.
enum class MaskKind : std::uint8_t {
  kNone,
  kRow,      // [n][s]: the same for every channel
  kElement,  // the extent and layout of x
};

struct Mask {
  const std::uint8_t* data = nullptr;
  MaskKind kind = MaskKind::kNone;
  explicit constexpr operator bool() const { return kind != MaskKind::kNone; }
};

}  // namespace normcore::kernels
