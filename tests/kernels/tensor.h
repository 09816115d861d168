// A dense tensor in guarded memory, read and written as float64 (stores round to nearest even).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/reference.h"
#include "guarded_buffer.h"

namespace normcore::kernels::testing {

class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::int64_t count, Placement placement)
      : dtype_(dtype),
        count_(count),
        buffer_(static_cast<std::size_t>(count) * size_of(dtype), size_of(dtype), placement) {}

  DType dtype() const { return dtype_; }
  std::int64_t count() const { return count_; }
  double get(std::int64_t index) const { return reference::load(view(), index); }
  void set(std::int64_t index, double value) { reference::store(view(), index, value); }
  void fill(double value) {
    for (std::int64_t i = 0; i < count_; ++i) set(i, value);
  }
  std::vector<double> values() const {
    std::vector<double> result(static_cast<std::size_t>(count_));
    for (std::int64_t i = 0; i < count_; ++i) result[static_cast<std::size_t>(i)] = get(i);
    return result;
  }
  const GuardedBuffer& buffer() const { return buffer_; }
  void* data() const { return buffer_.data(); }
  // Absent when default-constructed.
  MutableTensor view() const { return {buffer_.data(), dtype_}; }

 private:
  DType dtype_ = DType::kFloat32;
  std::int64_t count_ = 0;
  GuardedBuffer buffer_;
};

}  // namespace normcore::kernels::testing
