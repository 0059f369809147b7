// Differentiable batch norm + residual + activation, and add + activation.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "bindings/autograd.h"
#include "bindings/differentiable.h"
#include "bindings/ops.h"

namespace fused_resnet::bindings {
namespace {

// Everything but the tensors that may need a gradient; also brings the batch
// statistics back out of the autograd function.
struct Call {
  NormCall norm;
  NormCall residual_norm;
  bool has_residual_norm = false;
  int64_t act = 0;
  double negative_slope = 0.01;
};

Tensors8 run_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const OptionalTensor& residual_weight,
                     const OptionalTensor& residual_bias, const OptionalTensor& act_weight, Call& call,
                     bool save_mask) {
  Tensors8 out =
      forward_op().call(x, weight, bias, call.norm.running_mean, call.norm.running_var, residual, residual_weight,
                        residual_bias, call.residual_norm.running_mean, call.residual_norm.running_var, act_weight,
                        call.norm.training, call.has_residual_norm, call.residual_norm.training, call.norm.eps,
                        call.residual_norm.eps, call.act, call.negative_slope, save_mask);
  call.norm.mean = std::get<1>(out);
  call.norm.var = std::get<3>(out);
  call.residual_norm.mean = std::get<4>(out);
  call.residual_norm.var = std::get<6>(out);
  return out;
}

class BatchNormAct : public torch::autograd::Function<BatchNormAct> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const OptionalTensor& residual_weight,
                        const OptionalTensor& residual_bias, const OptionalTensor& act_weight, Call* call) {
    at::AutoDispatchBelowADInplaceOrView below;
    const bool has_residual = check::given(residual);
    const bool save_mask = has_residual && has_mask(call->act);
    auto [y, mean, rstd, var, residual_mean, residual_rstd, residual_var, mask] =
        run_forward(x, weight, bias, residual, residual_weight, residual_bias, act_weight, *call, save_mask);
    const bool identity = call->act == static_cast<int64_t>(Activation::kIdentity);
    const bool keep_residual = call->has_residual_norm || (has_residual && !save_mask && !identity);
    const bool two = call->has_residual_norm;
    ctx->save_for_backward(
        {x, mean, rstd, value_or_undefined(weight), value_or_undefined(bias), value_or_undefined(act_weight),
         save_mask ? mask : Tensor(), keep_residual ? *residual : Tensor(), two ? residual_mean : Tensor(),
         two ? residual_rstd : Tensor(), value_or_undefined(residual_weight), value_or_undefined(residual_bias)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["integers"] =
        std::vector<int64_t>{call->norm.training, call->residual_norm.training, has_residual, call->act};
    ctx->saved_data["reals"] = std::vector<double>{call->norm.eps, call->residual_norm.eps, call->negative_slope};
    ctx->saved_data["memory_format"] = static_cast<int64_t>(x.suggest_memory_format());
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kArguments = 8;
    variable_list result(kArguments);
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &mean = saved[1], &rstd = saved[2], &weight = saved[3], &bias = saved[4], &act_weight = saved[5],
                 &mask = saved[6], &residual = saved[7], &residual_mean = saved[8], &residual_rstd = saved[9],
                 &residual_weight = saved[10], &residual_bias = saved[11];
    // Hooks on saved tensors may bring x back in another layout; the mask's rows are those of this one.
    const auto format = static_cast<at::MemoryFormat>(ctx->saved_data["memory_format"].toInt());
    const Tensor x = mask.defined() ? in_memory_format(saved[0], format) : saved[0];
    const std::vector<int64_t> integers = ctx->saved_data["integers"].toIntVector();
    const std::vector<double> reals = ctx->saved_data["reals"].toDoubleVector();
    const bool training = integers[0] != 0, residual_training = integers[1] != 0, has_residual = integers[2] != 0;
    const int64_t act = integers[3];
    const double negative_slope = reals[2];
    const bool two = residual_mean.defined();
    Wanted wanted(ctx);
    std::array<bool, 7> needs{};
    needs[0] = wanted.next(true);
    needs[1] = wanted.next(weight.defined());
    needs[2] = wanted.next(bias.defined());
    needs[3] = wanted.next(has_residual);
    needs[4] = wanted.next(residual_weight.defined());
    needs[5] = wanted.next(residual_bias.defined());
    needs[6] = wanted.next(act_weight.defined());

    if (at::GradMode::is_enabled()) {
      Recorded r;
      const Tensor x_ = r.input(x, 0, needs[0]);
      const Tensor weight_ = r.input(weight, 1, needs[1]), bias_ = r.input(bias, 2, needs[2]);
      Tensor pre = stock_norm(x_, mean, rstd, weight_, bias_, training, reals[0]);
      if (residual.defined()) {
        const Tensor residual_ = r.input(residual, 3, needs[3]);
        const Tensor second_weight = r.input(residual_weight, 4, needs[4]);
        const Tensor second_bias = r.input(residual_bias, 5, needs[5]);
        pre = pre + (two ? stock_norm(residual_, residual_mean, residual_rstd, second_weight, second_bias,
                                      residual_training, reals[1])
                         : residual_);
      } else if (needs[3]) {
        pre = pre + r.placeholder(x, 3);  // the derivative is in the mask: the value does not matter
      }
      const Tensor act_weight_ = r.input(act_weight, 6, needs[6]);
      const Tensor y = mask.defined() ? pre * mask_derivative(mask, x, act, negative_slope)
                                      : stock_activation(pre, act, negative_slope, act_weight_);
      return r.grad(y.to(x.scalar_type()), grad_output, kArguments);
    }

    at::AutoDispatchBelowADInplaceOrView below;
    if (needs[3] && !two && act == static_cast<int64_t>(Activation::kIdentity)) {
      result[3] = grad_output;  // y = ... + residual: nothing to compute
      needs[3] = false;
    }
    if (std::none_of(needs.begin(), needs.end(), [](bool need) { return need; })) return result;
    auto [dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias, dact_weight] = backward_op().call(
        grad_output, x, mean, rstd, optional(weight), optional(bias), optional(residual), optional(residual_mean),
        optional(residual_rstd), optional(residual_weight), optional(residual_bias), optional(act_weight),
        optional(mask), training, residual_training, act, negative_slope, needs);
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[1] = parameter_grad(dweight, weight);
    if (needs[2]) result[2] = parameter_grad(dbias, bias);
    if (needs[3]) result[3] = dresidual;
    if (needs[4]) result[4] = parameter_grad(dresidual_weight, residual_weight);
    if (needs[5]) result[5] = parameter_grad(dresidual_bias, residual_bias);
    if (needs[6]) result[6] = parameter_grad(dact_weight, act_weight);
    return result;
  }
};

Tensor differentiate(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const OptionalTensor& residual_weight,
                     const OptionalTensor& residual_bias, const OptionalTensor& act_weight, Call& call) {
  const bool record =
      at::GradMode::is_enabled() && wants_grad({&x, &value_or_undefined(weight), &value_or_undefined(bias),
                                                &value_or_undefined(residual), &value_or_undefined(residual_weight),
                                                &value_or_undefined(residual_bias), &value_or_undefined(act_weight)});
  Tensor y = record ? BatchNormAct::apply(x, weight, bias, residual, residual_weight, residual_bias, act_weight, &call)
                    : std::get<0>(run_forward(x, weight, bias, residual, residual_weight, residual_bias, act_weight,
                                              call, /*save_mask=*/false));
  call.norm.update_running(x);
  if (call.has_residual_norm) call.residual_norm.update_running(x);
  return autocast_prelu(y, call.act);
}

Tensor batch_norm_act(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      const OptionalTensor& act_weight, bool training, double momentum, double eps, int64_t act,
                      double negative_slope) {
  constexpr const char* kOp = "batch_norm_act";
  check::activation_tensor(kOp, "x", x);
  const OptionalTensor slope = expand_slope(act_weight, x);
  check::norm(kOp, check::kNorm, x, weight, bias, running_mean, running_var, training, eps);
  check::activation(kOp, slope, act, x);
  Call call;
  call.norm = {running_mean, running_var, training, momentum, eps};
  call.act = act;
  call.negative_slope = negative_slope;
  if (!check::given(residual)) return differentiate(x, weight, bias, {}, {}, {}, slope, call);
  const auto [a, b] = promote(x, *residual);
  check::same(kOp, "residual", b, a);
  const auto narrow = [&](const OptionalTensor& t) { return check::given(t) && t->scalar_type() != a.scalar_type(); };
  if (a.scalar_type() != x.scalar_type() && (narrow(weight) || narrow(bias) || narrow(running_mean) || narrow(slope))) {
    // Parameters of x's own dtype, which a batch norm of the sum's would refuse: in two steps, as eager PyTorch.
    call.act = static_cast<int64_t>(Activation::kIdentity);
    const Tensor y = differentiate(x, weight, bias, {}, {}, {}, {}, call);
    const OptionalTensor wide = narrow(slope) ? OptionalTensor(slope->to(a.scalar_type())) : slope;
    return add_act_op().call(y, *residual, wide, act, negative_slope);
  }
  return differentiate(a, weight, bias, b, {}, {}, slope, call);
}

Tensor batch_norm_act_dual(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& residual,
                           const OptionalTensor& residual_running_mean, const OptionalTensor& residual_running_var,
                           const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
                           const OptionalTensor& act_weight, bool training, double momentum, double eps,
                           bool residual_training, double residual_momentum, double residual_eps, int64_t act,
                           double negative_slope) {
  constexpr const char* kOp = "dual_batch_norm_act";
  check::activation_tensor(kOp, "x", x);
  check::same(kOp, "residual", residual, x);
  const OptionalTensor slope = expand_slope(act_weight, x);
  check::norm(kOp, check::kNorm, x, weight, bias, running_mean, running_var, training, eps);
  check::norm(kOp, check::kResidualNorm, residual, residual_weight, residual_bias, residual_running_mean,
              residual_running_var, residual_training, residual_eps);
  check::activation(kOp, slope, act, x);
  Call call;
  call.norm = {running_mean, running_var, training, momentum, eps};
  call.residual_norm = {residual_running_mean, residual_running_var, residual_training, residual_momentum,
                        residual_eps};
  call.has_residual_norm = true;
  call.act = act;
  call.negative_slope = negative_slope;
  return differentiate(x, weight, bias, residual, residual_weight, residual_bias, slope, call);
}

// act(x + residual): the apply kernel with mean 0, scale 1 and bias -0.0, which keeps the sign of zero.
struct AddCall {
  Tensor zero, one, negative_zero;
  // Small enough to vanish beside a variance of one, even in double precision.
  static constexpr double kEps = 1e-30;

  explicit AddCall(const Tensor& x) {
    const auto options = x.options().dtype(check::stat_dtype(x.scalar_type()));
    const c10::SymInt c = x.sym_size(1);
    zero = at::zeros_symint({c}, options);
    one = at::ones_symint({c}, options);
    negative_zero = at::full_symint({c}, -0.0, options);
  }
  Tensors8 forward(const Tensor& x, const Tensor& residual, const OptionalTensor& act_weight, int64_t act,
                   double negative_slope, bool save_mask) const {
    return forward_op().call(x, {}, negative_zero, zero, one, residual, {}, {}, {}, {}, act_weight, false, false, false,
                             kEps, kEps, act, negative_slope, save_mask);
  }
};

class AddAct : public torch::autograd::Function<AddAct> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual, const OptionalTensor& act_weight,
                        int64_t act, double negative_slope) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensors8 out = AddCall(x).forward(x, residual, act_weight, act, negative_slope, has_mask(act));
    const bool keep = !has_mask(act) && act != static_cast<int64_t>(Activation::kIdentity);
    ctx->save_for_backward({keep ? x : Tensor(), keep ? residual : Tensor(), value_or_undefined(act_weight),
                            has_mask(act) ? std::get<7>(out) : Tensor()});
    ctx->set_materialize_grads(false);
    ctx->saved_data["act"] = act;
    ctx->saved_data["negative_slope"] = negative_slope;
    ctx->saved_data["memory_format"] = static_cast<int64_t>(x.suggest_memory_format());
    return std::get<0>(out);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kArguments = 5;
    variable_list result(kArguments);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &residual = saved[1], &act_weight = saved[2], &mask = saved[3];
    const int64_t act = ctx->saved_data["act"].toInt();
    const double negative_slope = ctx->saved_data["negative_slope"].toDouble();
    Wanted wanted(ctx);
    const bool needs_x = wanted.next(true), needs_residual = wanted.next(true);
    const bool needs_act_weight = wanted.next(act_weight.defined());
    const bool identity = act == static_cast<int64_t>(Activation::kIdentity);
    // Without x its layout, which is the mask's, comes through the gradient.
    const auto format = static_cast<at::MemoryFormat>(ctx->saved_data["memory_format"].toInt());
    const Tensor grad_output = mask.defined() ? in_memory_format(grads[0], format) : grads[0];

    if (at::GradMode::is_enabled()) {
      if (identity || mask.defined()) {  // linear in grad_output
        const Tensor g =
            identity
                ? grad_output
                : (grad_output * mask_derivative(mask, grad_output, act, negative_slope)).to(grad_output.scalar_type());
        if (needs_x) result[0] = g;
        if (needs_residual) result[1] = g;
        return result;
      }
      Recorded r;
      const Tensor x_ = r.input(x, 0, needs_x), residual_ = r.input(residual, 1, needs_residual);
      const Tensor act_weight_ = r.input(act_weight, 2, needs_act_weight);
      return r.grad(stock_activation(x_ + residual_, act, negative_slope, act_weight_), grad_output, kArguments);
    }

    // Both addends have the same gradient: it is computed once.
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor g = grad_output;
    if (!identity) {
      // With a mask nothing but the extent and layout of x is read.
      const Tensor& extent = mask.defined() ? grad_output : x;
      const AddCall call(extent);
      const Tensors7 out =
          backward_op().call(grad_output, extent, call.zero, call.one, {}, call.negative_zero, optional(residual), {},
                             {}, {}, {}, optional(act_weight), optional(mask), false, false, act, negative_slope,
                             {false, false, false, needs_x || needs_residual, false, false, needs_act_weight});
      g = std::get<3>(out);
      if (needs_act_weight) result[2] = parameter_grad(std::get<6>(out), act_weight);
    }
    if (needs_x) result[0] = g;
    if (needs_residual) result[1] = g;
    return result;
  }
};

Tensor add_act(const Tensor& x, const Tensor& residual, const OptionalTensor& act_weight, int64_t act,
               double negative_slope) {
  constexpr const char* kOp = "add_act";
  check::activation_tensor(kOp, "x", x);
  const auto [a, b] = promote(x, residual);
  check::same(kOp, "residual", b, a);
  const OptionalTensor slope = expand_slope(act_weight, x);
  check::activation(kOp, slope, act, x);
  if (at::GradMode::is_enabled() && wants_grad({&a, &b, &value_or_undefined(slope)})) {
    return autocast_prelu(AddAct::apply(a, b, slope, act, negative_slope), act);
  }
  return autocast_prelu(std::get<0>(AddCall(a).forward(a, b, slope, act, negative_slope, /*save_mask=*/false)), act);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CompositeImplicitAutograd, m) {
  m.impl("batch_norm_act", TORCH_FN(batch_norm_act));
  m.impl("batch_norm_act_dual", TORCH_FN(batch_norm_act_dual));
  m.impl("add_act", TORCH_FN(add_act));
}

}  // namespace fused_resnet::bindings
