// Every operator of the library in one place. Names with a leading underscore are the low-level
// operators: they carry kernels, autograd and shapes; the public ones only choose among them
// (batch_norm.cpp, group_norm.cpp).
#include <torch/library.h>

#include <vector>

TORCH_LIBRARY(normcore, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};

  m.def(
      "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? weight=None, Tensor? bias=None, bool training=False, float? momentum=0.1, "
      "float eps=1e-05, *, int[1] axis=1, Tensor? mask=None, str? activation=None, "
      "Tensor? residual=None, bool unbiased=True, Tensor(c!)? num_batches_tracked=None, "
      "ScalarType? dtype=None, str? group=None, str sync_weighting=\"count\") -> Tensor",
      tags);
  // The training call that changes nothing: (y, running_mean, running_var), the latter two new.
  m.def(
      "batch_norm_functional(Tensor input, Tensor running_mean, Tensor running_var, "
      "Tensor? weight=None, Tensor? bias=None, float? momentum=0.1, float eps=1e-05, *, "
      "int[1] axis=1, Tensor? mask=None, str? activation=None, Tensor? residual=None, "
      "bool unbiased=True, Tensor? num_batches_tracked=None, ScalarType? dtype=None, "
      "str? group=None, str sync_weighting=\"count\") -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05, *, int[1] axis=1, int[]? reduction_axes=None, Tensor? mask=None, "
      "str? activation=None, Tensor? residual=None, ScalarType? dtype=None, str? group=None, "
      "str sync_weighting=\"count\") -> Tensor",
      tags);

  // Instance norm of the samples' own statistics, which update the running ones.
  m.def(
      "_instance_norm_train(Tensor input, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor? weight=None, Tensor? bias=None, float momentum=0.1, float eps=1e-05, *, "
      "int[1] axis=1, Tensor? mask=None, str? activation=None, Tensor? residual=None, "
      "ScalarType? dtype=None) -> Tensor",
      tags);

  // group_norm for exported graphs: decomposes into aten operations.
  m.def(
      "_group_norm_decomposed(Tensor input, int num_groups, Tensor? weight=None, "
      "Tensor? bias=None, float eps=1e-05, *, int[1] axis=1, int[]? reduction_axes=None, "
      "Tensor? mask=None, str? activation=None, Tensor? residual=None, ScalarType? dtype=None, "
      "str? group=None, str sync_weighting=\"count\") -> Tensor",
      tags);

  // How a call of `op` ("batch_norm" or "group_norm") would run, in one line for people.
  m.def(
      "explain(Tensor input, str op, *, int[1] axis=1, int num_groups=32, int[]? "
      "reduction_axes=None, "
      "Tensor? mask=None, str? activation=None, bool affine_per_sample=False, bool training=True, "
      "bool backward=False, "
      "Device? device=None) -> str",
      tags);

  // (y, mean [C] float64, rstd [C], relu_bits). The latter are what the backward pass reads instead
  // of the residual (relu_bits.h), in the order of the given format; undefined without one.
  m.def(
      "_batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? mask, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, int[] axis, float? momentum, float eps, bool unbiased, "
      "str? activation, ScalarType? dtype, MemoryFormat? relu_bits_format=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  // (y, rstd [C])
  m.def(
      "_batch_norm_eval(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor running_mean, Tensor running_var, int[] axis, float eps, str? activation, "
      "ScalarType? dtype) -> (Tensor, Tensor)",
      tags);
  // gradients of (input, weight, bias, residual); undefined where output_mask is false
  m.def(
      "_batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, int[] axis, "
      "bool batch_statistics, float eps, str? activation, bool[4] output_mask, "
      "Tensor? relu_bits=None, MemoryFormat? relu_bits_format=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  // The derivative of the former: grad_grad_* are gradients with respect to its results (None:
  // zero). Gradients of (grad_output, input, weight, bias, residual); undefined where output_mask
  // is false.
  m.def(
      "_batch_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
      "Tensor? grad_grad_bias, Tensor? grad_grad_residual, Tensor grad_output, Tensor input, "
      "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, "
      "int[] axis, bool batch_statistics, float eps, str? activation, bool[5] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);

  // (y, mean [N, G] float64, rstd [N, G]), N the product of the kept axes
  m.def(
      "_group_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
      "int num_groups, int[] axis, int[]? reduction_axes, float eps, str? activation, "
      "ScalarType? dtype) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "_group_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, int num_groups, int[] axis, "
      "int[]? reduction_axes, float eps, str? activation, bool[4] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "_group_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
      "Tensor? grad_grad_bias, Tensor? grad_grad_residual, Tensor grad_output, Tensor input, "
      "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, "
      "int num_groups, int[] axis, int[]? reduction_axes, float eps, str? activation, "
      "bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);

  // Norms whose statistics are those of several ranks, around two sums over ranks. num_groups 0:
  // batch norm. All values of slices are flat, one for each slice.
  // [slices, 8] float64, to be added up over the ranks (moment_sums.h)
  m.def(
      "_sync_moments(Tensor input, Tensor? mask, int num_groups, int[] axis, "
      "int[]? reduction_axes, bool by_rank) -> Tensor",
      tags);
  // own: those of this rank, total: of all ranks. (mean, var, weight of a value) [slices] float64
  m.def(
      "_sync_statistics(Tensor own, Tensor total, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, bool unbiased, "
      "bool by_rank) -> (Tensor, Tensor, Tensor)",
      tags);
  // (y, rstd [slices])
  m.def(
      "_sync_apply(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor var, int num_groups, int[] axis, int[]? reduction_axes, float eps, "
      "str? activation, ScalarType? dtype) -> (Tensor, Tensor)",
      tags);
  // (sums [slices, 2] float64 to be added up over the ranks, gradients of weight, bias); undefined
  // where output_mask is false
  m.def(
      "_sync_gradient_sums(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, int num_groups, int[] axis, "
      "int[]? reduction_axes, float eps, str? activation, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)",
      tags);
  // gradients of (input, residual), given the sums of all ranks; those of residual need none
  m.def(
      "_sync_gradient(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor? mask, Tensor mean, Tensor rstd, Tensor? sums, Tensor share, "
      "int num_groups, int[] axis, int[]? reduction_axes, float eps, str? activation, "
      "bool[2] output_mask) -> (Tensor, Tensor)",
      tags);
  // The sum over the ranks of a process group, with derivatives.
  m.def("_all_reduce_sum(Tensor t, str group) -> Tensor", tags);
}
