// The halves of batch norm for whom a convolution does the other one, on the CPU: statistics without output, and the
// gradient of the input where the sums are known.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "bindings/backend.h"
#include "bindings/ops.h"
#include "bindings/plan.h"
#include "fused_resnet/batch_norm.h"

namespace fused_resnet::bindings {
namespace {

Tensors3 statistics(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                    bool training, double eps) {
  constexpr const char* kOp = "batch_norm_statistics";
  check::activation_tensor(kOp, "x", x);
  check::norm(kOp, check::kNorm, x, {}, {}, running_mean, running_var, training, eps);
  const Execution on(kOp, x);
  const Plan plan(x);
  const NormOperands norm = forward_operands(on, plan, {}, {}, running_mean, running_var, training, eps);
  if (plan.shape.numel() == 0) {
    norm.clear_batch_stats();
  } else if (training) {
    const Tensor workspace = plan.bytes(cpu::batch_norm_statistics_workspace(plan.shape));
    BatchNormStatistics p;
    p.shape = plan.shape;
    p.x = read(plan.x);
    p.norm = norm.params(/*batch_stats=*/true);
    p.workspace = write(workspace);
    p.runner = on.runner();
    on.say(plan.shape, "batch_norm", {"stats"});
    check::status(kOp, cpu::batch_norm_statistics(p));
  }
  return {norm.mean, norm.rstd, norm.var.defined() ? norm.var : plan.empty_stat(0)};
}

Tensor input_gradient(const Tensor& grad_output, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                      const OptionalTensor& weight, const Tensor& grad_weight, const Tensor& grad_bias, bool training,
                      const OptionalTensor& skip) {
  constexpr const char* kOp = "batch_norm_input_gradient";
  check::activation_tensor(kOp, "x", x);
  check::same(kOp, "grad_output", grad_output, x);
  check::statistic(kOp, "mean", mean, x);
  check::statistic(kOp, "rstd", rstd, x);
  check::channel(kOp, "weight", weight, x);
  check::statistic(kOp, "grad_weight", grad_weight, x);
  check::statistic(kOp, "grad_bias", grad_bias, x);
  if (check::given(skip)) check::same(kOp, "skip", *skip, x);
  const Execution on(kOp, x);
  const Plan plan(x);
  const NormOperands norm = saved_operands(plan, mean, rstd, weight, {});
  const Tensor dy = plan.in_layout(grad_output), dx = plan.empty();
  const Tensor added = check::given(skip) ? plan.in_layout(*skip) : Tensor();
  const Tensor dweight = grad_weight.contiguous(), dbias = grad_bias.contiguous();
  if (plan.shape.numel() == 0) return dx;
  const Tensor workspace = plan.bytes(on->backward_workspace(plan.shape));
  BatchNormInputGradient p;
  p.shape = plan.shape;
  p.dy = read(dy);
  p.x = read(plan.x);
  p.norm = norm.params(training);
  p.dweight = read(dweight);
  p.dbias = read(dbias);
  p.skip = read(added);
  p.dx = write(dx);
  p.workspace = write(workspace);
  p.runner = on.runner();
  on.say(plan.shape, "batch_norm", {"backward_apply"});
  check::status(kOp, cpu::batch_norm_input_gradient(p));
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("batch_norm_statistics", TORCH_FN(statistics));
  m.impl("batch_norm_input_gradient", TORCH_FN(input_gradient));
}

}  // namespace fused_resnet::bindings
