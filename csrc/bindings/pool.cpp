// The stem: batch norm + activation + 3x3/2 max-pool in one pass.
#include "fused_resnet/pool.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/max_pool2d.h>
#include <torch/library.h>

#include <algorithm>

#include "bindings/autograd.h"
#include "bindings/backend.h"
#include "bindings/differentiable.h"
#include "bindings/ops.h"
#include "bindings/plan.h"

namespace fused_resnet::bindings {
namespace {

constexpr const char* kImage = "(N, C, H, W)";

void check_image(const char* op, const Tensor& x) {
  check::activation_tensor(op, "x", x);
  check::dimensions(op, "x", x, 4, kImage);
  TORCH_CHECK(x.sym_size(2) > 0 && x.sym_size(3) > 0, op, ": expected x with at least one row and column, got ",
              x.sym_sizes());
}

// An image may have no spatial structure for its statistics (H = W = 1), but has one for the pool.
struct ImagePlan : Plan {
  int64_t h, w;
  std::array<int64_t, 4> pooled;

  explicit ImagePlan(const Tensor& input)
      : Plan(input),
        h(input.size(2)),
        w(input.size(3)),
        pooled{shape.n, shape.c, stem_pool_extent(h), stem_pool_extent(w)} {}
};

Tensors5 pool_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& act_weight, bool training, double eps, int64_t act, double negative_slope,
                      bool save_argmax) {
  constexpr const char* kOp = "batch_norm_act_max_pool_forward";
  check_image(kOp, x);
  check::norm(kOp, check::kNorm, x, weight, bias, running_mean, running_var, training, eps);
  check::activation(kOp, act_weight, act, x);

  const Execution on(kOp, x);
  const ImagePlan plan(x);
  const NormOperands norm = forward_operands(on, plan, weight, bias, running_mean, running_var, training, eps);
  const Tensor slope = plan.stat(act_weight);
  const Tensor y = empty_pooled(plan.pooled, plan.x.options(), plan.memory_format);
  const auto bytes = plan.x.options().dtype(at::kByte);
  const Tensor argmax = save_argmax ? empty_pooled(plan.pooled, bytes, plan.memory_format) : at::empty({0}, bytes);
  if (plan.shape.numel() > 0) {
    BatchNormActMaxPoolForward p;
    const Tensor workspace = plan.bytes(on->max_pool_workspace(plan.shape, plan.h, plan.w));
    p.shape = plan.shape;
    p.h = plan.h;
    p.w = plan.w;
    p.x = read(plan.x);
    p.norm = norm.params(training);
    p.act = act_params(act, negative_slope, slope);
    p.y = write(y);
    p.argmax = save_argmax ? argmax.mutable_data_ptr<uint8_t>() : nullptr;
    p.workspace = write(workspace);
    on.say(plan.shape, "pool", {"forward"});
    on.run(&Backend::max_pool_forward, p);
  } else {
    norm.clear_batch_stats();
  }
  return {y, norm.mean, norm.rstd, norm.var.defined() ? norm.var : plan.empty_stat(0), argmax};
}

Tensors4 pool_backward(const Tensor& grad_output, const Tensor& x, const Tensor& argmax, const Tensor& mean,
                       const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& act_weight, bool training, int64_t act, double negative_slope,
                       std::array<bool, 4> output_mask) {
  constexpr const char* kOp = "batch_norm_act_max_pool_backward";
  check_image(kOp, x);
  check::statistic(kOp, "mean", mean, x);
  check::statistic(kOp, "rstd", rstd, x);
  check::channel(kOp, "weight", weight, x);
  check::channel(kOp, "bias", bias, x);
  check::activation(kOp, act_weight, act, x);
  TORCH_CHECK(check::given(act_weight) || !output_mask[3], kOp,
              ": expected output_mask without act_weight, which needs act='prelu', got it");

  const Execution on(kOp, x);
  const ImagePlan plan(x);
  const auto pooled = [&](const char* name, const Tensor& t, at::ScalarType dtype) {
    check::device(kOp, name, t, x);
    TORCH_CHECK(t.sizes().equals(plan.pooled) && t.scalar_type() == dtype, kOp, ": expected ", name, " of shape ",
                at::IntArrayRef(plan.pooled), " and dtype ", dtype, ", got ", t.sizes(), " and ", t.scalar_type());
    return plan.in_layout(t);
  };
  const Tensor dy = pooled("grad_output", grad_output, x.scalar_type());
  const Tensor taps = pooled("argmax", argmax, at::kByte);
  const NormOperands norm = saved_operands(plan, mean, rstd, weight, bias);
  const Tensor slope = plan.stat(act_weight);
  const auto per_channel = [&](bool wanted) { return plan.empty_stat(wanted ? plan.shape.c : 0); };
  const auto target = [](const Tensor& t, bool wanted) { return wanted ? write(t) : nullptr; };
  const Tensor dx = output_mask[0] ? plan.empty() : plan.none();
  const Tensor dweight = per_channel(output_mask[1]);
  const Tensor dbias = per_channel(output_mask[2]);
  const Tensor dslope = per_channel(output_mask[3]);
  if (plan.shape.numel() > 0) {
    BatchNormActMaxPoolBackward p;
    const Tensor workspace = plan.bytes(on->max_pool_workspace(plan.shape, plan.h, plan.w));
    p.shape = plan.shape;
    p.h = plan.h;
    p.w = plan.w;
    p.dy = read(dy);
    p.x = read(plan.x);
    p.argmax = taps.const_data_ptr<uint8_t>();
    p.norm = norm.params(training);
    p.act = act_params(act, negative_slope, slope);
    p.dx = target(dx, output_mask[0]);
    p.dweight = target(dweight, output_mask[1]);
    p.dbias = target(dbias, output_mask[2]);
    p.dslope = target(dslope, output_mask[3]);
    p.workspace = write(workspace);
    on.say(plan.shape, "pool", {"backward_reduce", "backward_apply"});
    on.run(&Backend::max_pool_backward, p);
  } else {
    for (const Tensor& t : {dweight, dbias, dslope}) t.zero_();
  }
  return {dx, dweight, dbias, dslope};
}

struct Call {
  NormCall norm;
  int64_t act = 0;
  double negative_slope = 0.01;
};

Tensors5 run_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& act_weight, Call& call, bool save_argmax) {
  Tensors5 out = pool_forward_op().call(x, weight, bias, call.norm.running_mean, call.norm.running_var, act_weight,
                                        call.norm.training, call.norm.eps, call.act, call.negative_slope, save_argmax);
  call.norm.mean = std::get<1>(out);
  call.norm.var = std::get<3>(out);
  return out;
}

class BatchNormActMaxPool : public torch::autograd::Function<BatchNormActMaxPool> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& act_weight, Call* call) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, rstd, var, argmax] = run_forward(x, weight, bias, act_weight, *call, /*save_argmax=*/true);
    ctx->save_for_backward(
        {x, argmax, mean, rstd, value_or_undefined(weight), value_or_undefined(bias), value_or_undefined(act_weight)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = call->norm.training;
    ctx->saved_data["act"] = call->act;
    ctx->saved_data["reals"] = std::vector<double>{call->norm.eps, call->negative_slope};
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t kArguments = 5;
    variable_list result(kArguments);
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &argmax = saved[1], &mean = saved[2], &rstd = saved[3], &weight = saved[4],
                 &bias = saved[5], &act_weight = saved[6];
    const bool training = ctx->saved_data["training"].toBool();
    const int64_t act = ctx->saved_data["act"].toInt();
    const std::vector<double> reals = ctx->saved_data["reals"].toDoubleVector();
    const double eps = reals[0], negative_slope = reals[1];
    Wanted wanted(ctx);
    std::array<bool, 4> needs{};
    needs[0] = wanted.next(true);
    needs[1] = wanted.next(weight.defined());
    needs[2] = wanted.next(bias.defined());
    needs[3] = wanted.next(act_weight.defined());

    if (at::GradMode::is_enabled()) {
      Recorded r;
      const Tensor x_ = r.input(x, 0, needs[0]);
      const Tensor weight_ = r.input(weight, 1, needs[1]), bias_ = r.input(bias, 2, needs[2]);
      const Tensor act_weight_ = r.input(act_weight, 3, needs[3]);
      const Tensor pre = stock_norm(x_, mean, rstd, weight_, bias_, training, eps);
      const Tensor y = stock_activation(pre, act, negative_slope, act_weight_).to(x.scalar_type());
      return r.grad(at::max_pool2d(y, {3, 3}, {2, 2}, {1, 1}), grad_output, kArguments);
    }

    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias, dact_weight] =
        pool_backward_op().call(grad_output, x, argmax, mean, rstd, optional(weight), optional(bias),
                                optional(act_weight), training, act, negative_slope, needs);
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[1] = parameter_grad(dweight, weight);
    if (needs[2]) result[2] = parameter_grad(dbias, bias);
    if (needs[3]) result[3] = parameter_grad(dact_weight, act_weight);
    return result;
  }
};

Tensor batch_norm_act_max_pool(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& act_weight, bool training, double momentum, double eps,
                               int64_t act, double negative_slope) {
  constexpr const char* kOp = "batch_norm_act_max_pool";
  check_image(kOp, x);
  const OptionalTensor slope = expand_slope(act_weight, x);
  check::norm(kOp, check::kNorm, x, weight, bias, running_mean, running_var, training, eps);
  check::activation(kOp, slope, act, x);
  Call call;
  call.norm = {running_mean, running_var, training, momentum, eps};
  call.act = act;
  call.negative_slope = negative_slope;
  const bool record = at::GradMode::is_enabled() && wants_grad({&x, &value_or_undefined(weight),
                                                                &value_or_undefined(bias), &value_or_undefined(slope)});
  Tensor y = record ? BatchNormActMaxPool::apply(x, weight, bias, slope, &call)
                    : std::get<0>(run_forward(x, weight, bias, slope, call, /*save_argmax=*/false));
  call.norm.update_running(x);
  return autocast_prelu(y, act);
}

}  // namespace

void register_pool(torch::Library& m) {
  m.impl("batch_norm_act_max_pool_forward", TORCH_FN(pool_forward));
  m.impl("batch_norm_act_max_pool_backward", TORCH_FN(pool_backward));
}

TORCH_LIBRARY_IMPL(fused_resnet, CompositeImplicitAutograd, m) {
  m.impl("batch_norm_act_max_pool", TORCH_FN(batch_norm_act_max_pool));
}

}  // namespace fused_resnet::bindings
