// The batch-norm device operators, on any backend: check, allocate, fill the seam's
// structs, call.
#include "fused_resnet/batch_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings/backend.h"
#include "bindings/ops.h"
#include "bindings/plan.h"

namespace fused_resnet::bindings {
namespace {

Tensors8 forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& residual,
                 const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
                 const OptionalTensor& residual_running_mean, const OptionalTensor& residual_running_var,
                 const OptionalTensor& act_weight, bool training, bool residual_norm, bool residual_training,
                 double eps, double residual_eps, int64_t act, double negative_slope, bool save_mask) {
  constexpr const char* kOp = "batch_norm_act_forward";
  check::activation_tensor(kOp, "x", x);
  check::norm(kOp, check::kNorm, x, weight, bias, running_mean, running_var, training, eps);
  if (check::given(residual)) check::same(kOp, "residual", *residual, x);
  if (residual_norm) {
    TORCH_CHECK(check::given(residual), kOp, ": expected residual with residual_norm, got None");
    check::norm(kOp, check::kResidualNorm, *residual, residual_weight, residual_bias, residual_running_mean,
                residual_running_var, residual_training, residual_eps);
  }
  check::activation(kOp, act_weight, act, x);

  const Execution on(kOp, x);
  const Plan plan(x);
  const NormOperands norm = forward_operands(on, plan, weight, bias, running_mean, running_var, training, eps);
  NormOperands second;
  if (residual_norm) {
    second = forward_operands(on, plan, residual_weight, residual_bias, residual_running_mean, residual_running_var,
                              residual_training, residual_eps);
  }
  const Tensor r = check::given(residual) ? plan.in_layout(*residual) : Tensor();
  const Tensor slope = plan.stat(act_weight);
  const Tensor y = plan.empty();
  // Without a residual backward knows pre from x.
  const bool masked = save_mask && has_mask(act) && check::given(residual);
  const Tensor mask = plan.bytes(masked ? batch_norm_act_mask_bytes(plan.shape) : 0);
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : plan.empty_stat(0); };

  if (plan.shape.numel() > 0) {
    const Tensor workspace = plan.bytes(on->forward_workspace(plan.shape));
    BatchNormActForward p;
    p.shape = plan.shape;
    p.x = read(plan.x);
    p.norm = norm.params(training);
    p.residual = read(r);
    p.residual_has_norm = residual_norm;
    if (residual_norm) p.residual_norm = second.params(residual_training);
    p.act = act_params(act, negative_slope, slope);
    p.y = write(y);
    p.mask = mask.numel() > 0 ? mask.mutable_data_ptr<uint8_t>() : nullptr;
    p.workspace = write(workspace);
    on.say(plan.shape, "batch_norm", {p.norm.batch_stats || p.residual_norm.batch_stats ? "stats" : "", "apply"});
    on.run(&Backend::forward, p);
  } else {
    norm.clear_batch_stats();
    second.clear_batch_stats();
  }
  return {y,   norm.mean, norm.rstd, or_none(norm.var), or_none(second.mean), or_none(second.rstd), or_none(second.var),
          mask};
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
             const OptionalTensor& bias, const OptionalTensor& act_weight, int64_t act, double negative_slope) {
  constexpr const char* kOp = "batch_norm_act_apply";
  check::activation_tensor(kOp, "x", x);
  check::statistic(kOp, "mean", mean, x);
  check::statistic(kOp, "rstd", rstd, x);
  check::channel(kOp, "weight", weight, x);
  check::channel(kOp, "bias", bias, x);
  check::activation(kOp, act_weight, act, x);

  const Execution on(kOp, x);
  const Plan plan(x);
  const NormOperands norm = saved_operands(plan, mean, rstd, weight, bias);
  const Tensor slope = plan.stat(act_weight);
  const Tensor y = plan.empty();
  if (plan.shape.numel() == 0) return y;
  const Tensor workspace = plan.bytes(on->forward_workspace(plan.shape));
  BatchNormActForward p;
  p.shape = plan.shape;
  p.x = read(plan.x);
  p.norm = norm.params(/*batch_stats=*/false);
  p.act = act_params(act, negative_slope, slope);
  p.y = write(y);
  p.workspace = write(workspace);
  on.say(plan.shape, "batch_norm", {"apply"});
  on.run(&Backend::forward, p);
  return y;
}

// act(norm(x) + residual), or + norm(residual), with statistics that are known.
std::tuple<Tensor, Tensor> add(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& residual, const OptionalTensor& residual_mean,
                               const OptionalTensor& residual_rstd, const OptionalTensor& residual_weight,
                               const OptionalTensor& residual_bias, int64_t act, double negative_slope,
                               bool save_mask) {
  constexpr const char* kOp = "batch_norm_act_add";
  check::activation_tensor(kOp, "x", x);
  check::same(kOp, "residual", residual, x);
  check::statistic(kOp, "mean", mean, x);
  check::statistic(kOp, "rstd", rstd, x);
  check::channel(kOp, "weight", weight, x);
  check::channel(kOp, "bias", bias, x);
  const bool residual_norm = check::given(residual_mean);
  if (residual_norm) {
    TORCH_CHECK(check::given(residual_rstd), kOp, ": expected residual_rstd with residual_mean, got None");
    check::statistic(kOp, "residual_mean", *residual_mean, x);
    check::statistic(kOp, "residual_rstd", *residual_rstd, x);
    check::channel(kOp, "residual_weight", residual_weight, x);
    check::channel(kOp, "residual_bias", residual_bias, x);
  }
  check::activation(kOp, {}, act, x);

  const Execution on(kOp, x);
  const Plan plan(x);
  const NormOperands norm = saved_operands(plan, mean, rstd, weight, bias);
  NormOperands second;
  if (residual_norm) second = saved_operands(plan, *residual_mean, *residual_rstd, residual_weight, residual_bias);
  const Tensor r = plan.in_layout(residual), y = plan.empty();
  const Tensor mask = plan.bytes(save_mask && has_mask(act) ? batch_norm_act_mask_bytes(plan.shape) : 0);
  if (plan.shape.numel() == 0) return {y, mask};
  const Tensor workspace = plan.bytes(on->forward_workspace(plan.shape));
  BatchNormActForward p;
  p.shape = plan.shape;
  p.x = read(plan.x);
  p.norm = norm.params(/*batch_stats=*/false);
  p.residual = read(r);
  p.residual_has_norm = residual_norm;
  if (residual_norm) p.residual_norm = second.params(/*batch_stats=*/false);
  p.act = act_params(act, negative_slope, {});
  p.y = write(y);
  p.mask = mask.numel() > 0 ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  p.workspace = write(workspace);
  on.say(plan.shape, "batch_norm", {"apply"});
  on.run(&Backend::forward, p);
  return {y, mask};
}

Tensors7 backward(const Tensor& grad_output, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                  const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                  const OptionalTensor& residual_mean, const OptionalTensor& residual_rstd,
                  const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
                  const OptionalTensor& act_weight, const OptionalTensor& mask, bool training, bool residual_training,
                  int64_t act, double negative_slope, std::array<bool, 7> output_mask) {
  constexpr const char* kOp = "batch_norm_act_backward";
  check::activation_tensor(kOp, "x", x);
  check::same(kOp, "grad_output", grad_output, x);
  check::statistic(kOp, "mean", mean, x);
  check::statistic(kOp, "rstd", rstd, x);
  check::channel(kOp, "weight", weight, x);
  check::channel(kOp, "bias", bias, x);
  const bool residual_norm = check::given(residual_mean);
  if (check::given(residual)) check::same(kOp, "residual", *residual, x);
  if (residual_norm) {
    TORCH_CHECK(check::given(residual), kOp, ": expected residual with residual_mean, got None");
    TORCH_CHECK(check::given(residual_rstd), kOp, ": expected residual_rstd with residual_mean, got None");
    check::statistic(kOp, "residual_mean", *residual_mean, x);
    check::statistic(kOp, "residual_rstd", *residual_rstd, x);
    check::channel(kOp, "residual_weight", residual_weight, x);
    check::channel(kOp, "residual_bias", residual_bias, x);
  }
  TORCH_CHECK(residual_norm || !(output_mask[4] || output_mask[5]), kOp,
              ": expected output_mask without residual_weight and residual_bias, which need residual_mean, got them");
  check::activation(kOp, act_weight, act, x);
  TORCH_CHECK(check::given(act_weight) || !output_mask[6], kOp,
              ": expected output_mask without act_weight, which needs act='prelu', got it");

  const Execution on(kOp, x);
  const Plan plan(x);
  const bool masked = check::given(mask);
  if (masked) {
    check::device(kOp, "mask", *mask, x);
    const int64_t bytes = batch_norm_act_mask_bytes(plan.shape);
    TORCH_CHECK(has_mask(act) && mask->scalar_type() == at::kByte && mask->numel() == bytes && mask->is_contiguous(),
                kOp, ": expected mask as batch_norm_act_forward made it (", bytes, " bytes, relu or leaky_relu), got ",
                mask->sym_sizes(), " of dtype ", mask->scalar_type());
  }
  const NormOperands norm = saved_operands(plan, mean, rstd, weight, bias);
  NormOperands second;
  if (residual_norm) second = saved_operands(plan, *residual_mean, *residual_rstd, residual_weight, residual_bias);
  const Tensor slope = plan.stat(act_weight);
  const Tensor r = check::given(residual) ? plan.in_layout(*residual) : Tensor();
  const Tensor dy = plan.in_layout(grad_output);

  const auto like_x = [&](bool wanted) { return wanted ? plan.empty() : plan.none(); };
  const auto per_channel = [&](bool wanted) { return plan.empty_stat(wanted ? plan.shape.c : 0); };
  const auto target = [](const Tensor& t, bool wanted) { return wanted ? write(t) : nullptr; };
  const Tensor dx = like_x(output_mask[0]);
  const Tensor dweight = per_channel(output_mask[1]);
  const Tensor dbias = per_channel(output_mask[2]);
  const Tensor dresidual = like_x(output_mask[3]);
  const Tensor dresidual_weight = per_channel(output_mask[4]);
  const Tensor dresidual_bias = per_channel(output_mask[5]);
  const Tensor dslope = per_channel(output_mask[6]);

  if (plan.shape.numel() > 0) {
    const Tensor workspace = plan.bytes(on->backward_workspace(plan.shape));
    BatchNormActBackward p;
    p.shape = plan.shape;
    p.dy = read(dy);
    p.x = read(plan.x);
    p.norm = norm.params(training);
    p.residual = read(r);
    p.residual_has_norm = residual_norm;
    if (residual_norm) p.residual_norm = second.params(residual_training);
    p.act = act_params(act, negative_slope, slope);
    p.mask = masked ? mask->const_data_ptr<uint8_t>() : nullptr;
    p.dx = target(dx, output_mask[0]);
    p.dweight = target(dweight, output_mask[1]);
    p.dbias = target(dbias, output_mask[2]);
    p.dresidual = target(dresidual, output_mask[3]);
    p.dresidual_weight = target(dresidual_weight, output_mask[4]);
    p.dresidual_bias = target(dresidual_bias, output_mask[5]);
    p.dslope = target(dslope, output_mask[6]);
    p.workspace = write(workspace);
    on.say(plan.shape, "batch_norm", {"backward_reduce", "backward_apply"});
    on.run(&Backend::backward, p);
  } else {
    for (const Tensor& t : {dweight, dbias, dresidual_weight, dresidual_bias, dslope}) t.zero_();
  }
  return {dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias, dslope};
}

void update(Tensor& running_mean, Tensor& running_var, const Tensor& mean, const Tensor& var, int64_t count,
            double momentum) {
  constexpr const char* kOp = "batch_norm_update_";
  const auto vector = [&](const char* name, const Tensor& t) {
    check::device(kOp, name, t, mean);
    TORCH_CHECK(check::supported_dtype(t.scalar_type()), kOp, ": expected ", name,
                " to be float64, float32, bfloat16 or float16, got ", t.scalar_type());
    TORCH_CHECK(t.dim() == 1 && t.size(0) == mean.numel(), kOp, ": expected ", name, " of shape (", mean.numel(),
                ",), got ", t.sizes());
  };
  vector("mean", mean);
  vector("var", var);
  vector("running_mean", running_mean);
  vector("running_var", running_var);
  const at::ScalarType stat = mean.scalar_type();
  TORCH_CHECK((stat == at::kFloat || stat == at::kDouble) && var.scalar_type() == stat, kOp,
              ": expected mean and var both float32 or both float64, got ", stat, " and ", var.scalar_type());
  TORCH_CHECK(running_var.scalar_type() == running_mean.scalar_type(), kOp, ": expected running_var of dtype ",
              running_mean.scalar_type(), ", got ", running_var.scalar_type());
  TORCH_CHECK_VALUE(count > 1, kOp, ": expected count, the values per channel, of at least 2, got ", count);

  const Execution on(kOp, mean);
  const Tensor m = mean.contiguous();
  const Tensor v = var.contiguous();
  const Tensor rm = running_mean.contiguous();
  const Tensor rv = running_var.contiguous();
  BatchNormUpdateRunning p;
  p.c = m.numel();
  p.dtype = to_dtype(stat);
  p.running_dtype = to_dtype(rm.scalar_type());
  p.mean = read(m);
  p.var = read(v);
  p.count = count;
  p.momentum = momentum;
  p.running_mean = write(rm);
  p.running_var = write(rv);
  if (p.c > 0) on.run(&Backend::update_running, p);
  if (!rm.is_same(running_mean)) running_mean.copy_(rm);
  if (!rv.is_same(running_var)) running_var.copy_(rv);
}

// Autograd learns that the statistics changed: whoever saved them for backward gets its usual error. (The generic
// fallback bumps the versions of returned tensors only, and this operator returns none.)
void update_bumping_versions(c10::DispatchKeySet keys, Tensor& running_mean, Tensor& running_var, const Tensor& mean,
                             const Tensor& var, SymInt count, double momentum) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    update_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, running_mean, running_var, mean, var,
                           std::move(count), momentum);
  }
  running_mean.unsafeGetTensorImpl()->bump_version();
  running_var.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, ADInplaceOrView, m) {
  m.impl("batch_norm_update_", TORCH_FN(update_bumping_versions));
}

void register_batch_norm(torch::Library& m) {
  m.impl("batch_norm_act_forward", TORCH_FN(forward));
  m.impl("batch_norm_act_apply", TORCH_FN(apply));
  m.impl("batch_norm_act_add", TORCH_FN(add));
  m.impl("batch_norm_act_backward", TORCH_FN(backward));
  m.impl("batch_norm_update_", TORCH_FN(update));
}

}  // namespace fused_resnet::bindings
