// Convolution through ATen, with pooled memory on the CPU, and act(batch_norm(x)) -> convolution that keeps x alone for
// backward.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/library.h>

#include <optional>

#include "bindings/autocast.h"
#include "bindings/autograd.h"
#include "bindings/backend.h"
#include "bindings/conv_problem.h"
#include "bindings/differentiable.h"
#include "bindings/memory.h"
#include "bindings/ops.h"
#include "bindings/unit_passes.h"
#include "bindings/verbose.h"

namespace fused_resnet::bindings {

bool native_convolution(at::ScalarType dtype) {
  const auto ask = [](const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op.has_value() && op->typed<bool()>().call();
  };
  if (dtype == at::kBFloat16) {
    static const bool native = ask("mkldnn::_is_mkldnn_bf16_supported");
    return native;
  }
  if (dtype == at::kHalf) {
    static const bool native = ask("mkldnn::_is_mkldnn_fp16_supported");
    return native;
  }
  return true;
}

Tensor autocast_prelu(const Tensor& y, int64_t act) {
  if (act != static_cast<int64_t>(Activation::kPrelu) || y.scalar_type() == at::kDouble) return y;
  const at::DeviceType device = y.device().type();
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) return y;
  return y.to(at::autocast::get_autocast_dtype(device));
}

namespace {

// x's dtype, or float32 where this CPU would have to emulate it.
at::ScalarType compute_dtype(const Tensor& x) {
  return !x.is_cpu() || native_convolution(x.scalar_type()) ? x.scalar_type() : at::kFloat;
}

// A PoolScope where x is the CPU's.
class CpuPoolScope {
 public:
  explicit CpuPoolScope(const Tensor& x) {
    if (x.is_cpu()) scope_.emplace();
  }

 private:
  std::optional<PoolScope> scope_;
};

int64_t output_extent(const Tensor& x, const Tensor& weight, int64_t axis, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation) {
  const int64_t i = axis - 2;
  return (x.size(axis) + 2 * padding[i] - dilation[i] * (weight.size(axis) - 1) - 1) / stride[i] + 1;
}

// Before oneDNN says it less clearly: padding and all, the output must be something a machine can address.
void check_output_extent(const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation) {
  constexpr double kMost = 1e15;
  double elements = static_cast<double>(x.size(0)) * static_cast<double>(weight.size(0));
  for (int64_t axis : {2, 3}) {
    elements *= static_cast<double>(output_extent(x, weight, axis, stride, padding, dilation));
  }
  TORCH_CHECK(elements < kMost, "conv2d_forward: expected an output of fewer than ", kMost, " elements, got ", elements,
              " from x of shape ", x.sizes(), " with padding ", padding);
}

Tensor conv2d_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const CpuPoolScope scope(x);
  check::conv2d("conv2d_forward", check::kConv, x, weight, bias, c10::fromIntArrayRefSlow(stride),
                c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), groups);
  check_output_extent(x, weight, stride, padding, dilation);
  const ConvGeometry geometry{stride, padding, dilation, groups};
  const ConvShape shape = conv_shape(x.sizes(), weight, geometry);
  if (own_convolution(x, weight, c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(dilation), groups) &&
      !aten_faster_alone(shape, cpu::ConvDirection::kForward)) {
    return own_forward("conv2d_forward", x, weight, value_or_undefined(bias), geometry);
  }
  if (verbose && x.is_cpu()) [[unlikely]]
    say_conv("conv2d_forward", shape, "aten");
  const at::ScalarType dtype = x.scalar_type(), compute = compute_dtype(x);
  const OptionalTensor b = check::given(bias) ? OptionalTensor(bias->to(compute)) : std::nullopt;
  return at::convolution(x.to(compute), weight.to(compute), b, stride, padding, dilation, /*transposed=*/false,
                         /*output_padding=*/{0, 0}, groups)
      .to(dtype);
}

Tensors3 conv2d_backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight, bool has_bias,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                         std::array<bool, 3> output_mask) {
  constexpr const char* kOp = "conv2d_backward";
  check::conv2d(kOp, check::kConv, x, weight, {}, c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(padding),
                c10::fromIntArrayRefSlow(dilation), groups);
  check::device(kOp, "grad_output", grad_output, x);
  TORCH_CHECK(grad_output.scalar_type() == x.scalar_type(), kOp, ": expected grad_output of dtype ", x.scalar_type(),
              ", got ", grad_output.scalar_type());
  const std::array<int64_t, 4> expected{x.size(0), weight.size(0),
                                        output_extent(x, weight, 2, stride, padding, dilation),
                                        output_extent(x, weight, 3, stride, padding, dilation)};
  TORCH_CHECK(grad_output.sizes().equals(expected), kOp, ": expected grad_output of shape ", at::IntArrayRef(expected),
              ", got ", grad_output.sizes());

  const ConvGeometry geometry{stride, padding, dilation, groups};
  const ConvShape shape = conv_shape(x.sizes(), weight, geometry);
  const auto none = [&] { return at::empty({0}, x.options()); };
  const int64_t outputs[] = {weight.size(0)};
  const auto sizes = has_bias ? at::OptionalIntArrayRef(outputs) : at::OptionalIntArrayRef();
  const auto aten = [&](const Tensor& dy, const Tensor& input, const Tensor& filter, std::array<bool, 3> wanted) {
    return at::convolution_backward(dy, input, filter, sizes, stride, padding, dilation, /*transposed=*/false,
                                    /*output_padding=*/{0, 0}, groups, wanted);
  };
  if (own_convolution(x, weight, c10::fromIntArrayRefSlow(stride), c10::fromIntArrayRefSlow(dilation), groups)) {
    Tensor dx = none(), dweight = none(), dbias = none();
    if (output_mask[0] && aten_faster_alone(shape, cpu::ConvDirection::kBackwardData)) {
      const CpuPoolScope scope(x);
      if (verbose) [[unlikely]]
        say_conv(kOp, shape, "data gradient by aten");
      dx = std::get<0>(aten(grad_output, x, weight, {true, false, false}));
    } else if (output_mask[0]) {
      dx = own_backward_data(kOp, grad_output, x.sizes(), weight, geometry);
    }
    if (output_mask[1] || output_mask[2]) {
      std::tie(dweight, dbias) = own_backward_weight(kOp, grad_output, x, weight, output_mask[2], geometry);
      dbias = output_mask[2] ? dbias.to(x.scalar_type()) : none();
      if (!output_mask[1]) dweight = none();
    }
    return {dx, dweight, dbias};
  }

  if (verbose && x.is_cpu()) [[unlikely]]
    say_conv(kOp, shape, "aten");
  const at::ScalarType dtype = x.scalar_type(), compute = compute_dtype(x);
  const auto finish = [&](const Tensor& t) { return t.defined() ? t.to(dtype) : none(); };
  Tensor grad, input, filter, dx;
  {
    const CpuPoolScope scope(x);
    grad = grad_output.to(compute), input = x.to(compute), filter = weight.to(compute);
    if (output_mask[0]) dx = std::get<0>(aten(grad, input, filter, {true, false, false})).to(dtype);
  }
  // Gradients of parameters outlive the step: in the pool they would lie scattered between its short-lived blocks.
  Tensor dweight, dbias;
  if (output_mask[1] || output_mask[2]) {
    std::tie(std::ignore, dweight, dbias) = aten(grad, input, filter, {false, output_mask[1], output_mask[2]});
  }
  return {finish(dx), finish(dweight), finish(dbias)};
}

class Conv2d : public torch::autograd::Function<Conv2d> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Geometry& geometry) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight, value_or_undefined(bias)});
    ctx->set_materialize_grads(false);
    geometry.save(ctx);
    return geometry.forward(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kArguments = 4;
    variable_list result(kArguments);
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2];
    const Geometry geometry = Geometry::load(ctx);
    Wanted wanted(ctx);
    std::array<bool, 3> needs{};
    needs[0] = wanted.next(true);
    needs[1] = wanted.next(true);
    needs[2] = wanted.next(bias.defined());
    if (at::GradMode::is_enabled()) {
      Recorded r;
      const Tensor x_ = r.input(x, 0, needs[0]), weight_ = r.input(weight, 1, needs[1]);
      const Tensor bias_ = r.input(bias, 2, needs[2]);
      return r.grad(geometry.stock(x_, weight_, bias_), grad_output, kArguments);
    }
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias] = geometry.backward(grad_output, x, weight, needs);
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[1] = dweight;
    if (needs[2]) result[2] = dbias;
    return result;
  }
};

Tensor conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
              SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups) {
  check::conv2d("conv2d", check::kConv, x, weight, bias, stride, padding, dilation, groups);
  if (at::GradMode::is_enabled() && wants_grad({&x, &weight, &value_or_undefined(bias)})) {
    return Conv2d::apply(x, weight, bias, Geometry{stride.vec(), padding.vec(), dilation.vec(), groups});
  }
  return conv2d_forward_op().call(x, weight, bias, stride, padding, dilation, groups);
}

struct FusedCall {
  NormCall norm;
  int64_t act = 0;
  double negative_slope = 0.01;
  Geometry geometry{};
  bool own = false;  // our kernels: the batch norm is in the convolution's prologue
};

// Where our kernels run the convolution. prelu's slope has a gradient that their epilogue does not sum.
bool normalises_inside(const Tensor& x, const Tensor& conv_weight, int64_t act, const Geometry& g) {
  return act != static_cast<int64_t>(Activation::kPrelu) &&
         own_convolution(x, conv_weight, g.stride, g.dilation, g.groups);
}

// Elsewhere the normalised tensor lives from the one operator to the other only.
std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensor& x, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const OptionalTensor& act_weight,
                                               const Tensor& conv_weight, const OptionalTensor& conv_bias,
                                               FusedCall& call) {
  if (call.own) {
    Norm norm{value_or_undefined(weight),
              value_or_undefined(bias),
              value_or_undefined(call.norm.running_mean),
              value_or_undefined(call.norm.running_var),
              call.norm.training,
              call.norm.eps};
    take_statistics(x, &norm);
    call.norm.mean = norm.mean;
    call.norm.var = norm.var;
    const Conv conv{conv_weight, value_or_undefined(conv_bias), call.geometry};
    return {convolve({x, &norm, call.act, call.negative_slope}, conv, nullptr), norm.mean, norm.rstd};
  }
  auto [y, mean, rstd, var, unused_mean, unused_rstd, unused_var, mask] = forward_op().call(
      x, weight, bias, call.norm.running_mean, call.norm.running_var, {}, {}, {}, {}, {}, act_weight,
      call.norm.training, false, false, call.norm.eps, call.norm.eps, call.act, call.negative_slope, false);
  call.norm.mean = mean;
  call.norm.var = var;
  return {call.geometry.forward(y, conv_weight, conv_bias), mean, rstd};
}

class BatchNormActConv : public torch::autograd::Function<BatchNormActConv> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& act_weight, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                        FusedCall* call) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [z, mean, rstd] = run_forward(x, weight, bias, act_weight, conv_weight, conv_bias, *call);
    ctx->save_for_backward({x, mean, rstd, value_or_undefined(weight), value_or_undefined(bias),
                            value_or_undefined(act_weight), conv_weight, value_or_undefined(conv_bias)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["integers"] = std::vector<int64_t>{call->norm.training, call->act, call->own};
    ctx->saved_data["reals"] = std::vector<double>{call->norm.eps, call->negative_slope};
    call->geometry.save(ctx);
    return z;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kArguments = 7;
    variable_list result(kArguments);
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &mean = saved[1], &rstd = saved[2], &weight = saved[3], &bias = saved[4],
                 &act_weight = saved[5], &conv_weight = saved[6], &conv_bias = saved[7];
    const std::vector<int64_t> integers = ctx->saved_data["integers"].toIntVector();
    const std::vector<double> reals = ctx->saved_data["reals"].toDoubleVector();
    const bool training = integers[0] != 0;
    const int64_t act = integers[1];
    const double eps = reals[0], negative_slope = reals[1];
    const Geometry geometry = Geometry::load(ctx);
    Wanted wanted(ctx);
    std::array<bool, 6> needs{};
    needs[0] = wanted.next(true);
    needs[1] = wanted.next(weight.defined());
    needs[2] = wanted.next(bias.defined());
    needs[3] = wanted.next(act_weight.defined());
    needs[4] = wanted.next(true);
    needs[5] = wanted.next(conv_bias.defined());

    if (at::GradMode::is_enabled()) {
      Recorded r;
      const Tensor x_ = r.input(x, 0, needs[0]);
      const Tensor weight_ = r.input(weight, 1, needs[1]), bias_ = r.input(bias, 2, needs[2]);
      const Tensor act_weight_ = r.input(act_weight, 3, needs[3]);
      const Tensor conv_weight_ = r.input(conv_weight, 4, needs[4]), conv_bias_ = r.input(conv_bias, 5, needs[5]);
      const Tensor pre = stock_norm(x_, mean, rstd, weight_, bias_, training, eps);
      const Tensor y = stock_activation(pre, act, negative_slope, act_weight_).to(x.scalar_type());
      return r.grad(geometry.stock(y, conv_weight_, conv_bias_), grad_output, kArguments);
    }

    at::AutoDispatchBelowADInplaceOrView below;
    const bool through_norm = needs[0] || needs[1] || needs[2] || needs[3];
    if (integers[2] != 0) {
      const Norm norm{weight, bias, {}, {}, training, eps, mean, rstd};
      const Conv conv{conv_weight, conv_bias, geometry};
      const Operand in{x, &norm, act, negative_slope};
      const Gradient dz{in_memory_format(grad_output, at::MemoryFormat::ChannelsLast)};
      if (needs[4] || needs[5]) {
        auto [dconv_weight, dconv_bias] = weight_gradient(dz, conv, in);
        if (needs[4]) result[4] = dconv_weight;
        if (needs[5]) result[5] = dconv_bias;
      }
      if (!through_norm) return result;
      const Gradient g = data_gradient(dz, conv, in);
      if (needs[0]) result[0] = input_gradient(g);
      if (needs[1]) result[1] = parameter_grad(g.dweight, weight);
      if (needs[2]) result[2] = parameter_grad(g.dbias, bias);
      return result;
    }
    // Frozen weights: the convolution's data gradient reads the extent of its input only.
    Tensor y = needs[4] ? apply_op().call(x, mean, rstd, optional(weight), optional(bias), optional(act_weight), act,
                                          negative_slope)
                        : x;
    auto [dy, dconv_weight, dconv_bias] =
        geometry.backward(grad_output, y, conv_weight, {through_norm, needs[4], needs[5]});
    y.reset();  // before the next large allocation
    if (needs[4]) result[4] = dconv_weight;
    if (needs[5]) result[5] = dconv_bias;
    if (!through_norm) return result;
    auto [dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias, dact_weight] = backward_op().call(
        dy, x, mean, rstd, optional(weight), optional(bias), {}, {}, {}, {}, {}, optional(act_weight), {}, training,
        false, act, negative_slope, {needs[0], needs[1], needs[2], false, false, false, needs[3]});
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[1] = parameter_grad(dweight, weight);
    if (needs[2]) result[2] = parameter_grad(dbias, bias);
    if (needs[3]) result[3] = parameter_grad(dact_weight, act_weight);
    return result;
  }
};

Tensor batch_norm_act_conv(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& act_weight,
                           bool training, double momentum, double eps, int64_t act, double negative_slope,
                           const Tensor& conv_weight, const OptionalTensor& conv_bias, SymIntArrayRef stride,
                           SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups) {
  constexpr const char* kOp = "batch_norm_act_conv";
  check::conv2d(kOp, check::kFusedConv, x, conv_weight, conv_bias, stride, padding, dilation, groups);
  const OptionalTensor slope = expand_slope(act_weight, x);
  check::norm(kOp, check::kNorm, x, weight, bias, running_mean, running_var, training, eps);
  check::activation(kOp, slope, act, x);
  FusedCall call;
  call.norm = {running_mean, running_var, training, momentum, eps};
  call.act = act;
  call.negative_slope = negative_slope;
  call.geometry = {stride.vec(), padding.vec(), dilation.vec(), groups};
  call.own = normalises_inside(x, conv_weight, act, call.geometry);
  const bool record = at::GradMode::is_enabled() &&
                      wants_grad({&x, &value_or_undefined(weight), &value_or_undefined(bias),
                                  &value_or_undefined(slope), &conv_weight, &value_or_undefined(conv_bias)});
  Tensor z = record ? BatchNormActConv::apply(x, weight, bias, slope, conv_weight, conv_bias, &call)
                    : std::get<0>(run_forward(x, weight, bias, slope, conv_weight, conv_bias, call));
  call.norm.update_running(x);
  return z;
}

template <at::DeviceType kDevice>
Tensor conv2d_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                       SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups) {
  const Autocast<kDevice> autocast;
  return conv2d_op().call(autocast.cast(x), autocast.cast(weight), autocast.cast(bias), stride, padding, dilation,
                          groups);
}

template <at::DeviceType kDevice>
Tensor batch_norm_act_conv_autocast(const Tensor& x, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& act_weight, bool training,
                                    double momentum, double eps, int64_t act, double negative_slope,
                                    const Tensor& conv_weight, const OptionalTensor& conv_bias, SymIntArrayRef stride,
                                    SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups) {
  const Autocast<kDevice> autocast;
  const Tensor w = autocast.cast(conv_weight);
  const OptionalTensor b = autocast.cast(conv_bias);
  if (w.scalar_type() == x.scalar_type()) {
    return batch_norm_act_conv_op().call(x, running_mean, running_var, weight, bias, act_weight, training, momentum,
                                         eps, act, negative_slope, w, b, stride, padding, dilation, groups);
  }
  // x wider than the convolution's dtype: the batch norm runs in x's dtype, and a cast stands between the two.
  const Tensor extent = autocast.cast(x);
  check::conv2d("batch_norm_act_conv", check::kFusedConv, extent, w, b, stride, padding, dilation, groups);
  // The convolution may fail after the batch norm has succeeded: until both have, only copies are updated.
  const bool update = training && check::given(running_mean) && check::given(running_var);
  OptionalTensor mean = running_mean, var = running_var;
  if (update) mean = running_mean->detach().clone(), var = running_var->detach().clone();
  const Tensor y = batch_norm_act_op().call(x, mean, var, weight, bias, {}, act_weight, training, momentum, eps, act,
                                            negative_slope);
  Tensor z = conv2d_op().call(autocast.cast(y), w, b, stride, padding, dilation, groups);
  if (update) {
    const at::NoGradGuard no_grad;
    running_mean->copy_(*mean);
    running_var->copy_(*var);
  }
  return z;
}

}  // namespace

void register_conv(torch::Library& m) {
  m.impl("conv2d_forward", TORCH_FN(conv2d_forward));
  m.impl("conv2d_backward", TORCH_FN(conv2d_backward));
}

TORCH_LIBRARY_IMPL(fused_resnet, CompositeImplicitAutograd, m) {
  m.impl("conv2d", TORCH_FN(conv2d));
  m.impl("batch_norm_act_conv", TORCH_FN(batch_norm_act_conv));
}

TORCH_LIBRARY_IMPL(fused_resnet, AutocastCPU, m) {
  m.impl("conv2d", TORCH_FN(conv2d_autocast<at::kCPU>));
  m.impl("batch_norm_act_conv", TORCH_FN(batch_norm_act_conv_autocast<at::kCPU>));
}

TORCH_LIBRARY_IMPL(fused_resnet, AutocastCUDA, m) {
  m.impl("conv2d", TORCH_FN(conv2d_autocast<at::kCUDA>));
  m.impl("batch_norm_act_conv", TORCH_FN(batch_norm_act_conv_autocast<at::kCUDA>));
}

}  // namespace fused_resnet::bindings
