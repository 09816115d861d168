// One call of a norm as a value: all that the tests vary, and the tensors drawn for it.
#pragma once

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "guarded_buffer.h"
#include "normcore/kernels/norm_input.h"
#include "tensor.h"

namespace normcore::kernels::testing {

// A named row of tests/shapes/shapes.txt.
struct Shape {
  std::string name;
  Extent extent;
  std::int64_t num_groups = 1;
};
const std::vector<Shape>& shapes();
std::ostream& operator<<(std::ostream& stream, const Shape& shape);
const Shape& shape(const std::string& name);

inline constexpr DType kAllDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16,
                                       DType::kFloat16};
inline constexpr Layout kBothLayouts[] = {Layout::kNCS, Layout::kNSC};
inline constexpr Activation kAllActivations[] = {Activation::kNone, Activation::kReLU,
                                                 Activation::kSiLU, Activation::kGelu,
                                                 Activation::kGeluTanh};
const char* name_of(DType dtype);
const char* name_of(Layout layout);
const char* name_of(Activation activation);

struct NormCase {
  Extent extent;
  Layout layout = Layout::kNCS;
  std::int64_t num_groups = 0;  // 0: batch norm
  DType x = DType::kFloat32;
  DType y = DType::kFloat32;  // and of every gradient but x's, and of their cotangents
  std::optional<DType> scale = DType::kFloat32;
  std::optional<DType> bias = DType::kFloat32;
  std::optional<DType> residual;
  bool affine_per_sample = false;
  MaskKind mask = MaskKind::kNone;
  bool garbage_under_mask = true;  // NaN at masked-out positions
  Activation activation = Activation::kNone;
  double eps = 1e-5;
  double mean = 0.5;            // of x; its standard deviation is about 1
  double cotangent_mean = 0.3;  // the same of the cotangent of grad_x
  DType running = DType::kFloat32;
  bool running_statistics = true;
  bool cumulative = false;
  bool unbiased = true;
  bool many_runners = true;
  Placement placement = Placement::kEnd;

  std::int64_t affine_count() const { return affine_per_sample ? extent.n * extent.c : extent.c; }
  std::int64_t slice_count() const { return num_groups == 0 ? extent.c : extent.n * num_groups; }
};
std::string to_string(const NormCase& c);

// Calls of one shape that together meet every output dtype, mixed, per-sample and absent
// parameters, every activation with and without a residual, both kinds of mask, every kind of
// running statistics and every placement in memory.
std::vector<NormCase> variants(const Shape& shape, Layout layout, DType x, bool group_norm);

struct Inputs {
  explicit Inputs(const NormCase& c);

  NormInput norm_input() const;
  // Every tensor by name, to compare before and after.
  std::vector<std::pair<std::string, const GuardedBuffer*>> buffers() const;

  NormCase norm_case;
  Tensor x, scale, bias, residual, grad_y, running_mean, running_var;
  GuardedBuffer mask;
};

// What a double backward pass takes beside the inputs: cotangents of what the backward pass gives,
// in the same dtypes. A default-constructed tensor is absent.
struct Cotangents {
  explicit Cotangents(const NormCase& c);

  GradientCotangents view() const;
  std::vector<std::pair<std::string, const GuardedBuffer*>> buffers() const;

  Tensor x, scale, bias, residual;
};

}  // namespace normcore::kernels::testing
