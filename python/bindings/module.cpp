// Python extension normcore._C. Importing it loads libnormcore, which registers the operators
// (torch.ops.normcore); calls go through those. This module tells how the library was built, and
// the library what it has to know of tensor subclasses.
#include <normcore/build_info.h>
#include <normcore/ops.h>
#include <normcore/override_aten.h>
#include <normcore/settings.h>
#include <normcore/subclass.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

namespace {

// The module normcore._dtensor; None while there are no DTensors.
py::object dtensor_rules() {
  return py::module_::import("normcore._subclass").attr("dtensor_rules")();
}

bool is_dtensor(const char* op, const at::Tensor& input,
                const std::vector<normcore::NamedTensor>& others) {
  const py::gil_scoped_acquire gil;
  const py::object rules = dtensor_rules();
  if (rules.is_none()) return false;
  py::dict given;
  for (const auto& [name, tensor] : others) given[name] = py::cast(tensor);
  return rules.attr("is_dtensor")(op, input, given).cast<bool>();
}

bool is_spread(const at::Tensor& dtensor, const normcore::RunningState& running,
               at::IntArrayRef axis) {
  const py::gil_scoped_acquire gil;
  const auto& [mean, var, num_batches_tracked] = running;
  return dtensor_rules()
      .attr("is_spread")(dtensor, mean, var, num_batches_tracked, axis)
      .cast<bool>();
}

at::Tensor gathered(const at::Tensor& sum) {
  const py::gil_scoped_acquire gil;
  const py::object rules = dtensor_rules();
  return rules.is_none() ? sum : rules.attr("gathered")(sum).cast<at::Tensor>();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads the native library of normcore.";
  normcore::set_subclass_hooks(
      {.is_dtensor = is_dtensor, .is_spread = is_spread, .gathered = gathered});
  m.def(
      "build_info",
      [] {
        const normcore::BuildInfo info = normcore::build_info();
        py::dict result;
        result["version"] = info.version;
        result["torch_version"] = info.torch_version;
        result["cxx_compiler"] = info.cxx_compiler;
        result["simd_target"] = info.simd_target;
        result["cuda"] = info.cuda;
        return result;
      },
      "Versions, compiler and instruction set of the native library.");
  m.def("activation_names", &normcore::activation_names,
        "The values of `activation`, besides None.");
  m.def("set_batch_invariant", &normcore::set_batch_invariant, py::arg("enabled"));
  m.def("batch_invariant", &normcore::batch_invariant);
  m.def("set_cuda_path", &normcore::set_cuda_path, py::arg("name"));
  m.def("cuda_path", &normcore::cuda_path);
  m.def("set_spare_multiprocessors", &normcore::set_spare_multiprocessors, py::arg("count"));
  m.def("spare_multiprocessors", &normcore::spare_multiprocessors);
  m.def("set_debug_sync", &normcore::set_debug_sync, py::arg("enabled"));
  m.def("debug_sync", &normcore::debug_sync);
  // Registration takes the dispatcher's lock, whose holder may want the interpreter's.
  m.def("enable_aten_override", &normcore::enable_aten_override,
        py::call_guard<py::gil_scoped_release>());
  m.def("disable_aten_override", &normcore::disable_aten_override,
        py::call_guard<py::gil_scoped_release>());
  m.def("aten_override_calls", [] {
    const auto calls = normcore::aten_override_calls();
    return py::make_tuple(calls.normcore, calls.aten);
  });
}
