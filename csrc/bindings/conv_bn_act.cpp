// act(batch_norm(conv(x)) + residual) as one autograd function where our kernels run the convolution: its epilogue sums
// the statistics, and backward of the batch norm happens as the convolution's gradients read theirs.
// Saved: x, the convolution's output, statistics, parameters, and what the activation's derivative needs.
// Source: docs/convolution.md.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <utility>

#include "bindings/autocast.h"
#include "bindings/autograd.h"
#include "bindings/conv_problem.h"
#include "bindings/differentiable.h"
#include "bindings/ops.h"
#include "bindings/unit_passes.h"

namespace fused_resnet::bindings {
namespace {

constexpr int64_t kIdentity = static_cast<int64_t>(Activation::kIdentity);

// The differentiable tensors, in the order of the autograd function's arguments.
enum Argument : size_t { kX, kConvWeight, kConvBias, kWeight, kBias, kResidual, kActWeight, kTensors };
using Arguments = std::array<Tensor, kTensors>;

struct Unit {
  NormCall norm;
  int64_t act = 0;
  double negative_slope = 0.01;
  Geometry geometry{};
};

struct Outputs {
  Tensor y, mask, z;
  Norm norm;
};

Outputs run_forward(const Arguments& a, Unit& unit, bool save_mask) {
  Outputs out;
  out.norm = {a[kWeight],
              a[kBias],
              value_or_undefined(unit.norm.running_mean),
              value_or_undefined(unit.norm.running_var),
              unit.norm.training,
              unit.norm.eps};
  Norm& norm = out.norm;
  out.z = convolve({a[kX]}, {a[kConvWeight], a[kConvBias], unit.geometry}, &norm);
  unit.norm.mean = norm.mean;
  unit.norm.var = norm.var;
  const OptionalTensor weight = optional(norm.weight), bias = optional(norm.bias);
  if (!a[kActWeight].defined()) {
    std::tie(out.y, out.mask) = add_op().call(out.z, norm.mean, norm.rstd, weight, bias, optional(a[kResidual]), {}, {},
                                              {}, {}, unit.act, unit.negative_slope, save_mask);
  } else {
    out.y = apply_op().call(out.z, norm.mean, norm.rstd, weight, bias, a[kActWeight], unit.act, unit.negative_slope);
  }
  return out;
}

class ConvBnAct : public torch::autograd::Function<ConvBnAct> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& conv_weight,
                        const OptionalTensor& conv_bias, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const OptionalTensor& act_weight, Unit* unit) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Arguments a{x,
                      conv_weight,
                      value_or_undefined(conv_bias),
                      value_or_undefined(weight),
                      value_or_undefined(bias),
                      value_or_undefined(residual),
                      value_or_undefined(act_weight)};
    const Outputs out = run_forward(a, *unit, /*save_mask=*/true);
    const bool keep_residual = !has_mask(unit->act) && unit->act != kIdentity;
    variable_list saved(a.begin(), a.end());
    if (!keep_residual) saved[kResidual] = Tensor();
    for (const Tensor& t : {out.z, out.norm.mean, out.norm.rstd, has_mask(unit->act) ? out.mask : Tensor()})
      saved.push_back(t);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["integers"] = std::vector<int64_t>{unit->norm.training, unit->act, a[kResidual].defined()};
    ctx->saved_data["reals"] = std::vector<double>{unit->norm.eps, unit->negative_slope};
    unit->geometry.save(ctx);
    return out.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kResults = kTensors + 1;
    variable_list result(kResults);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> integers = ctx->saved_data["integers"].toIntVector();
    const std::vector<double> reals = ctx->saved_data["reals"].toDoubleVector();
    const bool training = integers[0] != 0, has_residual = integers[2] != 0;
    const int64_t act = integers[1];
    const double negative_slope = reals[1];
    Arguments a;
    std::copy_n(saved.begin(), a.size(), a.begin());
    // Hooks on saved tensors may bring it back in another layout; the mask's rows are those of this one.
    const Tensor z = in_memory_format(saved[kTensors], at::MemoryFormat::ChannelsLast), mask = saved[kTensors + 3];
    const Norm norm{a[kWeight], a[kBias], {}, {}, training, reals[0], saved[kTensors + 1], saved[kTensors + 2]};
    const Conv conv{a[kConvWeight], a[kConvBias], Geometry::load(ctx)};
    Wanted wanted(ctx);
    std::array<bool, kTensors> needs{};
    for (size_t i = 0; i < kTensors; ++i) needs[i] = wanted.next(i == kResidual ? has_residual : a[i].defined());

    if (at::GradMode::is_enabled()) {
      Recorded r;
      Arguments own;
      for (size_t i = 0; i < kTensors; ++i) own[i] = r.input(a[i], i, needs[i]);
      Norm own_norm = norm;
      own_norm.weight = own[kWeight];
      own_norm.bias = own[kBias];
      Tensor pre = own_norm.stock(Conv{own[kConvWeight], own[kConvBias], conv.geometry}.stock(own[kX]));
      if (a[kResidual].defined()) {
        pre = pre + own[kResidual];
      } else if (needs[kResidual]) {
        pre = pre + r.placeholder(z, kResidual);  // the derivative is in the mask: the value does not matter
      }
      const Tensor y = mask.defined() ? pre * mask_derivative(mask, z, act, negative_slope)
                                      : stock_activation(pre, act, negative_slope, own[kActWeight]);
      return r.grad(y.to(z.scalar_type()), grads[0], kResults);
    }

    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor dout = in_memory_format(grads[0], at::MemoryFormat::ChannelsLast);
    // Where the derivative is one bit or none, the convolution's gradients bring theirs through the batch norm
    // themselves; a residual's gradient is the one that they read then. Else that gradient is made here.
    const bool inside = act == kRelu || act == kIdentity;
    const bool through_norm = needs[kX] || needs[kConvWeight] || needs[kConvBias];
    const bool residual_pass = needs[kResidual] && act != kIdentity;
    const bool sums = inside && through_norm && training;
    auto [dz, dweight, dbias, dresidual, u1, u2, dact_weight] = backward_op().call(
        dout, z, norm.mean, norm.rstd, optional(norm.weight), optional(norm.bias), optional(a[kResidual]), {}, {}, {},
        {}, optional(a[kActWeight]), optional(mask), training, false, act, negative_slope,
        {through_norm && !inside, needs[kWeight] || sums, needs[kBias] || sums, residual_pass, false, false,
         needs[kActWeight]});
    if (needs[kWeight]) result[kWeight] = parameter_grad(dweight, norm.weight);
    if (needs[kBias]) result[kBias] = parameter_grad(dbias, norm.bias);
    if (needs[kResidual]) result[kResidual] = residual_pass ? dresidual : grads[0];
    if (needs[kActWeight]) result[kActWeight] = parameter_grad(dact_weight, a[kActWeight]);
    if (!through_norm) return result;
    Gradient g{dz};
    if (inside) g = {residual_pass ? dresidual : dout, residual_pass ? Tensor() : mask, &norm, z, dweight, dbias};
    const Operand in{a[kX]};
    if (needs[kConvWeight] || needs[kConvBias]) {
      auto [dconv_weight, dconv_bias] = weight_gradient(g, conv, in);
      if (needs[kConvWeight]) result[kConvWeight] = dconv_weight;
      if (needs[kConvBias]) result[kConvBias] = dconv_bias;
    }
    if (needs[kX]) result[kX] = data_gradient(g, conv, in).dy;
    return result;
  }
};

// A tensor of the output's extent, of one element in memory: what the batch norm's checks read.
Tensor output_extent(const Tensor& x, const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef padding,
                     SymIntArrayRef dilation) {
  const auto extent = [&](size_t i) {
    const auto axis = static_cast<int64_t>(i) + 2;
    return (x.sym_size(axis) + 2 * padding[i] - dilation[i] * (weight.sym_size(axis) - 1) - 1) / stride[i] + 1;
  };
  return at::empty({}, x.options()).expand_symint({x.sym_size(0), weight.sym_size(0), extent(0), extent(1)});
}

Tensor conv_bn_act(const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, const OptionalTensor& act_weight, bool training, double momentum,
                   double eps, int64_t act, double negative_slope) {
  constexpr const char* kOp = "conv_bn_act";
  check::conv2d(kOp, check::kFusedConv, x, conv_weight, conv_bias, stride, padding, dilation, groups);
  const auto given = [](const OptionalTensor& t) { return check::given(t); };
  // A residual beside prelu is read by no pass that knows the statistics.
  const bool prelu = act == static_cast<int64_t>(Activation::kPrelu);
  const bool own = own_convolution(x, conv_weight, stride, dilation, groups) && !(prelu && given(residual)) &&
                   !(given(residual) && residual->scalar_type() != x.scalar_type());
  if (!own) {
    const Tensor z = conv2d_op().call(x, conv_weight, conv_bias, stride, padding, dilation, std::move(groups));
    return batch_norm_act_op().call(z, running_mean, running_var, weight, bias, residual, act_weight, training,
                                    momentum, eps, act, negative_slope);
  }
  const Tensor extent = output_extent(x, conv_weight, stride, padding, dilation);
  const OptionalTensor slope = expand_slope(act_weight, extent);
  check::norm(kOp, check::kNorm, extent, weight, bias, running_mean, running_var, training, eps);
  check::activation(kOp, slope, act, extent);
  if (given(residual)) check::same(kOp, "residual", *residual, extent);
  Unit unit;
  unit.norm = {running_mean, running_var, training, momentum, eps};
  unit.act = act;
  unit.negative_slope = negative_slope;
  unit.geometry = {stride.vec(), padding.vec(), dilation.vec(), groups};
  const Arguments a{x,
                    conv_weight,
                    value_or_undefined(conv_bias),
                    value_or_undefined(weight),
                    value_or_undefined(bias),
                    value_or_undefined(residual),
                    value_or_undefined(slope)};
  bool record = false;
  for (const Tensor& t : a) record = record || wants_grad({&t});
  const Tensor y = at::GradMode::is_enabled() && record
                       ? ConvBnAct::apply(x, conv_weight, conv_bias, weight, bias, residual, slope, &unit)
                       : run_forward(a, unit, /*save_mask=*/false).y;
  unit.norm.update_running(y);
  return autocast_prelu(y, act);
}

template <at::DeviceType kDevice>
Tensor conv_bn_act_autocast(const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                            SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                            const OptionalTensor& act_weight, bool training, double momentum, double eps, int64_t act,
                            double negative_slope) {
  Tensor y;
  {
    const Autocast<kDevice> autocast;
    y = conv_bn_act_op().call(autocast.cast(x), autocast.cast(conv_weight), autocast.cast(conv_bias), stride, padding,
                              dilation, std::move(groups), running_mean, running_var, weight, bias, residual,
                              act_weight, training, momentum, eps, act, negative_slope);
  }
  return autocast_prelu(y, act);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CompositeImplicitAutograd, m) { m.impl("conv_bn_act", TORCH_FN(conv_bn_act)); }
TORCH_LIBRARY_IMPL(fused_resnet, AutocastCPU, m) { m.impl("conv_bn_act", TORCH_FN(conv_bn_act_autocast<at::kCPU>)); }
TORCH_LIBRARY_IMPL(fused_resnet, AutocastCUDA, m) { m.impl("conv_bn_act", TORCH_FN(conv_bn_act_autocast<at::kCUDA>)); }

}  // namespace fused_resnet::bindings
