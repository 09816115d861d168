// The tensors of one kernel call. Operands that are not laid out as the kernel reads them are
// copied, results that are not laid out as it writes them get a buffer, and `finish` copies the
// buffers back. The object owns all of them and has to live until the kernel has run. The input has
// at least one element.
#pragma once

#include <c10/util/SmallVector.h>
#include <normcore/kernels/norm_input.h>

#include <utility>

#include "checks.h"
#include "mapping.h"

namespace normcore {

class Staging {
 public:
  // is_aligned: as CUDA kernels need it that read whole vectors.
  Staging(const Operands& operands, const CheckedNorm<std::int64_t>& norm, Samples samples,
          bool is_aligned = false);

  const kernels::NormInput& input() const { return input_; }

  // Tensors of the input's shape.
  kernels::ConstTensor read(const Tensor& t);
  kernels::MutableTensor write(const Tensor& result);

  // Tensors with one entry per channel (or per sample and channel, or per slice).
  kernels::ConstTensor read_vector(const Tensor& t);
  kernels::MutableTensor update_vector(const Tensor& t);

  kernels::NormGradients write(const Gradients& gradients);
  kernels::GradientCotangents read(const Cotangents& cotangents);

  void finish();

 private:
  Mapping mapping_;
  bool is_aligned_;
  kernels::NormInput input_;
  c10::SmallVector<Tensor, 6> owned_;
  c10::SmallVector<std::pair<Tensor, Tensor>, 2> pending_;  // result, buffer
};

}  // namespace normcore
