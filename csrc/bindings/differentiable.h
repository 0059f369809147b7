// What the differentiable operators share before and after their autograd function.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <tuple>

#include "bindings/checks.h"
#include "bindings/ops.h"

namespace fused_resnet::bindings {

// One batch normalisation of a call: its running statistics, and, once the forward
// operator has run, the statistics of the batch.
struct NormCall {
  OptionalTensor running_mean = std::nullopt, running_var = std::nullopt;
  bool training = false;
  double momentum = 0.1;
  double eps = 1e-5;
  Tensor mean{}, var{};

  // After everything that can fail. An empty batch keeps the statistics.
  void update_running(const Tensor& x) {
    if (!training || !check::given(running_mean)) return;
    const SymInt count = check::per_channel(x);
    // No new version: stock batch norms save the statistics they do not need for backward, and must not be told.
    at::AutoDispatchBelowADInplaceOrView below;
    if (count != 0) update_op().call(*running_mean, *running_var, mean, var, count, momentum);
  }
};

// prelu's slope may have one element for all channels; its gradient is then summed.
inline OptionalTensor expand_slope(const OptionalTensor& act_weight, const Tensor& x) {
  if (!check::given(act_weight) || act_weight->dim() > 1 || act_weight->sym_numel() != 1) return act_weight;
  return act_weight->expand_symint({x.sym_size(1)});
}

// x + residual of float32 and half precision is float32, as stock PyTorch has it. Every other mix is refused later.
inline std::tuple<Tensor, Tensor> promote(const Tensor& x, const Tensor& residual) {
  const auto half = [](at::ScalarType t) { return t == at::kBFloat16 || t == at::kHalf; };
  if (!residual.defined()) return {x, residual};
  const at::ScalarType a = x.scalar_type(), b = residual.scalar_type();
  if (half(a) && b == at::kFloat) return {x.to(b), residual};
  if (a == at::kFloat && half(b)) return {x, residual.to(a)};
  return {x, residual};
}

}  // namespace fused_resnet::bindings
