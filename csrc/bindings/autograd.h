// What the autograd functions share: gradient bookkeeping, and the stock, twice
// differentiable forward that stands in when a backward pass is itself recorded.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/var_mean.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>
#include <utility>
#include <vector>

#include "bindings/ops.h"
#include "bindings/plan.h"

namespace fused_resnet::bindings {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool wants_grad(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (t->defined() && t->requires_grad()) return true;
  }
  return false;
}

inline const Tensor& value_or_undefined(const OptionalTensor& t) {
  static const Tensor undefined;
  return t.has_value() ? *t : undefined;
}

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Answers "is this gradient wanted?" for the tensor arguments in order; arguments
// that were None have no edge in the graph.
class Wanted {
 public:
  explicit Wanted(const AutogradContext* ctx) : ctx_(ctx) {}
  bool next(bool present) { return present && ctx_->needs_input_grad(edge_++); }

 private:
  const AutogradContext* ctx_;
  size_t edge_ = 0;
};

// A (C,) gradient in its parameter's dtype.
inline Tensor parameter_grad(const Tensor& grad, const Tensor& parameter) {
  return grad.scalar_type() == parameter.scalar_type() ? grad : grad.to(parameter.scalar_type());
}

// The arguments of a recorded backward pass. Each differentiable one is replaced
// by an alias, so that a path from one argument to another through the outer
// graph is not walked twice.
class Recorded {
 public:
  Tensor input(const Tensor& t, size_t position, bool wanted) {
    if (!t.defined() || !wanted) return t;
    return add(at::alias(t), position);
  }
  // Stands for an argument whose value the result's derivative does not depend on.
  Tensor placeholder(const Tensor& like, size_t position) {
    return add(at::zeros_like(like).set_requires_grad(true), position);
  }
  // Gradients of y, placed by position into a list of `size`.
  variable_list grad(const Tensor& y, const Tensor& grad_output, size_t size) const {
    variable_list result(size);
    if (inputs_.empty()) return result;
    const variable_list grads = torch::autograd::grad({y}, inputs_, {grad_output}, /*retain_graph=*/true,
                                                      /*create_graph=*/true, /*allow_unused=*/true);
    for (size_t i = 0; i < grads.size(); ++i) {
      // An argument that y does not depend on has a zero gradient, not a missing one.
      result[positions_[i]] = grads[i].defined() ? grads[i] : at::zeros_like(inputs_[i]);
    }
    return result;
  }

 private:
  Tensor add(Tensor t, size_t position) {
    inputs_.push_back(t);
    positions_.push_back(position);
    return t;
  }
  variable_list inputs_;
  std::vector<size_t> positions_;
};

// `t` dense in a memory format that it also shows by its strides, which say nothing
// by themselves where an extent is 1.
inline Tensor in_memory_format(const Tensor& t, at::MemoryFormat format) {
  const Tensor dense = t.contiguous(format);
  if (dense.suggest_memory_format() == format) return dense;
  const auto sizes = dense.sym_sizes();
  std::vector<SymInt> strides;
  if (format == at::MemoryFormat::Contiguous) {
    strides.assign(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  } else {
    strides = sizes.size() == 4 ? c10::get_channels_last_strides_2d(sizes) : c10::get_channels_last_strides_3d(sizes);
  }
  return dense.as_strided_symint(sizes, strides);
}

// (C,) to (1, C, 1, ...), in the dtype of x's statistics.
inline Tensor per_channel_view(const Tensor& t, const Tensor& x) {
  std::vector<SymInt> sizes(x.dim(), 1);
  sizes[1] = x.sym_size(1);
  return t.to(check::stat_dtype(x.scalar_type())).view_symint(sizes);
}

// Batch normalisation in elementary operations, in the dtype of the statistics.
// Training: mean and variance are functions of x; else the saved ones.
inline Tensor stock_norm(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                         const Tensor& bias, bool training, double eps) {
  const Tensor wide = x.to(check::stat_dtype(x.scalar_type()));
  Tensor y;
  if (training) {
    std::vector<int64_t> dims{0};
    for (int64_t i = 2; i < x.dim(); ++i) dims.push_back(i);
    const auto [var, center] = at::var_mean(wide, dims, /*correction=*/at::Scalar(0), /*keepdim=*/true);
    y = (wide - center) * (var + eps).rsqrt();
  } else {
    y = (wide - per_channel_view(mean, x)) * per_channel_view(rstd, x);
  }
  if (weight.defined()) y = y * per_channel_view(weight, x);
  if (bias.defined()) y = y + per_channel_view(bias, x);
  return y;
}

inline Tensor stock_activation(const Tensor& pre, int64_t act, double negative_slope, const Tensor& act_weight) {
  switch (static_cast<Activation>(act)) {
    case Activation::kRelu:
      return at::relu(pre);
    case Activation::kLeakyRelu:
      return at::leaky_relu(pre, negative_slope);
    case Activation::kPrelu:
      return at::prelu(pre, act_weight.to(pre.scalar_type()));
    case Activation::kSigmoid:
      return at::sigmoid(pre);
    case Activation::kTanh:
      return at::tanh(pre);
    case Activation::kSilu:
      return at::silu(pre);
    case Activation::kIdentity:
      break;
  }
  return pre;
}

// The derivative of relu or leaky_relu as a tensor of x's shape, from one bit per
// element in rows of the axis that is contiguous in memory.
inline Tensor mask_derivative(const Tensor& mask, const Tensor& x, int64_t act, double negative_slope) {
  const Plan plan(x);
  const Shape& s = plan.shape;
  const bool nhwc = s.layout == Layout::kNHWC;
  const int64_t row = nhwc ? s.c : s.s;
  const int64_t rows = nhwc ? s.n * s.s : s.n * s.c;
  const Tensor places = at::arange(8, mask.options());
  Tensor bits = mask.view({rows, (row + 7) / 8, 1}).bitwise_right_shift(places).bitwise_and(1);
  bits = bits.view({rows, (row + 7) / 8 * 8}).narrow(1, 0, row);
  if (nhwc) {
    std::vector<int64_t> sizes{s.n};
    for (int64_t i = 2; i < x.dim(); ++i) sizes.push_back(x.size(i));
    sizes.push_back(s.c);
    bits = bits.reshape(sizes).movedim(-1, 1);
  } else {
    bits = bits.reshape(x.sizes());
  }
  const Tensor keep = bits.to(check::stat_dtype(x.scalar_type()));
  const double slope = act == static_cast<int64_t>(Activation::kLeakyRelu) ? negative_slope : 0.0;
  return keep * (1.0 - slope) + slope;
}

}  // namespace fused_resnet::bindings
