// How the elements of a strided tensor become an Extent {n, c, s} of the kernels, decided once per
// call from strides. c are the feature axes; n are the kept axes (group norm) or, for batch norm,
// whatever lies outside of c in memory; s is the rest. The order of axes in memory is used as it is
// where it reads
//   batch norm   [reduced] [feature] [reduced]
//   group norm   [kept] [feature] [reduced], or [kept] [reduced] [feature]
// with feature and kept axes ascending; axes of size 1 do not count. Everything else (other orders,
// gaps, expanded axes) is copied, into the input's own order where that one fits, else into [kept]
// [feature] [reduced].
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <normcore/kernels/types.h>

#include "checks.h"

namespace normcore {

enum class Samples { kKept, kReduced };  // whether statistics are separate for every index of n

class Mapping {
 public:
  // `input` has at least one element.
  Mapping(const Tensor& input, const Axes& axes, Samples samples);

  const kernels::Extent& extent() const { return extent_; }
  kernels::Layout layout() const { return layout_; }

  // Whether the kernel reads `t`, of the input's shape, where it is.
  bool reads(const Tensor& t) const;
  // `t`, of the input's shape, in the order of the kernel: `t` itself or a copy.
  Tensor arrange(const Tensor& t) const;
  // The same for a mask: broadcast to the input's shape, as bool.
  Tensor arrange_mask(const Tensor& mask) const;
  // A mask that is the same for all channels, as bool [n][s].
  Tensor arrange_row_mask(const Tensor& mask) const;
  bool is_row_mask(const Tensor& mask) const;
  // Where a kernel writes `result`: `result` itself, or a new tensor to be copied into it.
  Tensor buffer_for(const Tensor& result) const;

 private:
  // Strides of a dense tensor whose axes lie in memory as order_ says.
  at::DimVector dense_strides(at::IntArrayRef sizes) const;
  Tensor arrange_as(const Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) const;

  at::DimVector sizes_;
  at::DimVector order_;  // axes, outermost first
  at::DimVector features_;
  kernels::Extent extent_;
  kernels::Layout layout_ = kernels::Layout::kNCS;
};

}  // namespace normcore
