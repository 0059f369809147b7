// Registers the operators, and exposes them and the kernels' capabilities to Python.
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "bindings/backend.h"
#include "bindings/conv_problem.h"
#include "bindings/inference.h"
#include "bindings/memory.h"
#include "bindings/ops.h"
#include "bindings/schemas.h"
#include "bindings/verbose.h"
#include "fused_resnet/capability.h"
#include "fused_resnet/memory.h"

namespace fused_resnet::bindings {
namespace {

namespace py = pybind11;

// The operators themselves, with as little as can be between Python and the dispatcher. pybind11 refuses what is not a
// tensor with a TypeError that shows the signature.
using Pair = std::array<int64_t, 2>;

std::array<SymInt, 2> symbolic(const Pair& pair) { return {SymInt(pair[0]), SymInt(pair[1])}; }

// A Python function over an operator whose arguments pybind11 converts by itself.
template <typename... Args>
void def_op(py::module_& m, const char* name, const c10::TypedOperatorHandle<Tensor(Args...)>& (*op)()) {
  m.def(name, [op](Args... args) { return op().call(args...); }, py::call_guard<py::gil_scoped_release>());
}

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Pair& stride,
              const Pair& padding, const Pair& dilation, int64_t groups) {
  return conv2d_op().call(x, weight, bias, symbolic(stride), symbolic(padding), symbolic(dilation), groups);
}

Tensor batch_norm_act_conv(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& act_weight,
                           bool training, double momentum, double eps, int64_t act, double negative_slope,
                           const Tensor& conv_weight, const OptionalTensor& conv_bias, const Pair& stride,
                           const Pair& padding, const Pair& dilation, int64_t groups) {
  return batch_norm_act_conv_op().call(x, running_mean, running_var, weight, bias, act_weight, training, momentum, eps,
                                       act, negative_slope, conv_weight, conv_bias, symbolic(stride), symbolic(padding),
                                       symbolic(dilation), groups);
}

// And updates the running statistics; `counts`: values per channel of each batch norm.
Tensor residual_block(const Tensor& x, const std::vector<Tensor>& conv_weights,
                      const std::vector<OptionalTensor>& weights, const std::vector<OptionalTensor>& biases,
                      const std::vector<OptionalTensor>& running_means, const std::vector<OptionalTensor>& running_vars,
                      const std::vector<bool>& training, const std::vector<double>& momenta,
                      const std::vector<double>& eps, const std::vector<int64_t>& geometry,
                      const std::vector<int64_t>& counts, bool downsample, bool recompute, bool preact) {
  std::vector<SymInt> extents(geometry.begin(), geometry.end());
  c10::List<bool> flags;
  for (const bool flag : training) flags.push_back(flag);
  const auto list = [](const std::vector<OptionalTensor>& tensors) {
    c10::List<OptionalTensor> result;
    for (const OptionalTensor& t : tensors) result.push_back(t);
    return result;
  };
  const std::vector<Tensor> out =
      residual_block_op().call(x, conv_weights, list(weights), list(biases), list(running_means), list(running_vars),
                               flags, eps, extents, downsample, recompute, preact);
  size_t next = 1;
  for (size_t i = 0; i < training.size(); ++i) {
    if (!training[i]) continue;
    const Tensor &mean = out[next], &var = out[next + 1];
    next += 2;
    if (!check::given(running_means[i]) || counts[i] == 0) continue;
    Tensor running_mean = *running_means[i], running_var = *running_vars[i];
    at::AutoDispatchBelowADInplaceOrView below;  // NormCall::update_running says why
    update_op().call(running_mean, running_var, mean, var, counts[i], momenta[i]);
  }
  return out[0];
}

// `shape` of the weight, (O, C / groups, KH, KW).
bool conv_supported(const std::array<int64_t, 4>& shape, const Pair& stride, const Pair& dilation, int64_t groups,
                    bool small) {
  ConvShape s;
  s.k = shape[0];
  s.c = shape[1] * groups;
  s.r = shape[2];
  s.s = shape[3];
  s.stride_h = stride[0];
  s.stride_w = stride[1];
  s.dilation_h = dilation[0];
  s.dilation_w = dilation[1];
  s.groups = groups;
  s.h = small ? 1 : kSmallImage + 1;
  s.w = 1;
  return own_groups(s) && cpu::conv_supported(s);
}

std::vector<std::string> built_isas() {
  std::array<bool, kCpuIsaCount> built{};
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);
  for (size_t i = 0; i < count; ++i) built[static_cast<size_t>(table[i].isa)] = true;
  std::vector<std::string> names;
  for (int i = 0; i < kCpuIsaCount; ++i) {
    if (built[i]) names.emplace_back(isa_name(static_cast<CpuIsa>(i)));
  }
  return names;
}

py::list kernel_table() {
  py::list rows;
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);
  for (const KernelInfo* k = table; k != table + count; ++k) {
    py::dict row;
    row["op"] = k->op;
    row["pass"] = k->pass;
    row["dtype"] = dtype_name(k->dtype);
    row["isa"] = isa_name(k->isa);
    row["name"] = k->name;
    row["supported"] = k->isa <= cpu::detected_isa();
    rows.append(row);
  }
  return rows;
}

void set_isa_cap(const std::string& name) {
  CpuIsa isa{};
  TORCH_CHECK_VALUE(parse_isa(name.c_str(), &isa),
                    "set_isa_cap: expected 'scalar', 'avx2', 'avx512', 'avx512_bf16' or 'amx', got '", name, "'");
  const Status status = cpu::set_isa_cap(isa);
  TORCH_CHECK(status.ok(), "set_isa_cap: ", status.message, ", got '", name, "' on a machine with ",
              isa_name(cpu::detected_isa()));
}

py::dict build_config() {
  py::dict config;
#if defined(__clang__)
  config["compiler"] = "clang " __clang_version__;
#else
  config["compiler"] = "gcc " __VERSION__;
#endif
  config["cpp_standard"] = static_cast<int64_t>(__cplusplus);
  config["torch_version"] = TORCH_VERSION;
  config["isas"] = built_isas();
#ifdef FUSED_RESNET_WITH_CUDA
  config["cuda"] = true;
#else
  config["cuda"] = false;
#endif
  return config;
}

}  // namespace

TORCH_LIBRARY(fused_resnet, m) {
  for (const char* schema : kDeviceSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
  for (const char* schema : kCpuSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
  m.def(kUpdateSchema, {at::Tag::pt2_compliant_tag});
  for (const char* schema : kDifferentiableSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

// The device operators have no derivative of their own: calling backward through one says so.
TORCH_LIBRARY_IMPL(fused_resnet, Autograd, m) {
  for (const char* schema : kDeviceSchemas) {
    m.impl(bare_name(schema).c_str(), torch::autograd::autogradNotImplementedFallback());
  }
  for (const char* schema : kCpuSchemas) {
    m.impl(bare_name(schema).c_str(), torch::autograd::autogradNotImplementedFallback());
  }
  // On to ADInplaceOrView (batch_norm.cpp), which the fallback above would skip.
  m.impl("batch_norm_update_", torch::CppFunction::makeFallthrough());
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fused_resnet. The public interface is fused_resnet.ops.";
  using Release = py::call_guard<py::gil_scoped_release>;

  def_op(m, "batch_norm_act", batch_norm_act_op);
  def_op(m, "batch_norm_act_dual", dual_op);
  def_op(m, "batch_norm_act_max_pool", max_pool_op);
  def_op(m, "add_act", add_act_op);
  m.def("batch_norm_act_conv", batch_norm_act_conv, Release());
  m.def("conv2d", conv2d, Release());
  m.def("residual_block", residual_block, Release());

  m.attr("SMALL_IMAGE") = kSmallImage;
  m.def("conv_supported", conv_supported, "Whether the convolutions inside a block can be this one.");
  m.def("native_convolution", native_convolution, "Whether ATen convolves this dtype natively on this CPU.");
  m.def("build_config", build_config);
  m.def("why_no_cuda", why_no_cuda, "Why CUDA device `index` cannot run the kernels; None: it can.");
  m.def("detected_isa", [] { return isa_name(cpu::detected_isa()); });
  m.def("current_isa", [] { return isa_name(cpu::current_isa()); });
  m.def("isa_note", [] { return cpu::isa_note(); }, "Why a level that the CPU has is not used; None: there is none.");
  m.def("built_isas", built_isas);
  m.def("set_isa_cap", set_isa_cap);
  m.def("kernel_table", kernel_table);
  m.def("set_verbose", [](bool on) { verbose = on; });
  m.def("set_winograd", set_winograd);
  m.def("winograd", winograd);
  m.def("set_split_bfloat16", set_split_bfloat16);
  m.def("split_bfloat16", split_bfloat16);
  m.def("last_level_cache_bytes", cpu::last_level_cache_bytes);

  define_inference(m);

  install_pool_allocator();
  m.def("set_pool_enabled", set_pool_enabled);
  m.def("pool_enabled", pool_enabled);
  m.def("trim_pool", cpu::pool_trim, Release());
  m.def("pool_stats", [] {
    const cpu::PoolStats stats = cpu::pool_stats();
    py::dict result;
    result["reserved_bytes"] = stats.reserved_bytes;
    result["live_bytes"] = stats.live_bytes;
    result["peak_live_bytes"] = stats.peak_live_bytes;
    return result;
  });
}

}  // namespace fused_resnet::bindings
