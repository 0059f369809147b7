// The passes that fused units are made of: a convolution with the batch norm before it in its prologue and what the one
// behind it needs in its epilogue, forward and backward. Source: docs/convolution.md.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/autograd.h"
#include "bindings/ops.h"

namespace fused_resnet::bindings {

constexpr int64_t kRelu = static_cast<int64_t>(Activation::kRelu);
constexpr double kNoSlope = 0.01;

// The geometry of a convolution as an autograd function keeps it.
struct Geometry {
  std::vector<SymInt> stride, padding, dilation;
  SymInt groups = 1;

  static constexpr size_t kValues = 7;
  static Geometry of(SymIntArrayRef all) { return {{all[0], all[1]}, {all[2], all[3]}, {all[4], all[5]}, all[6]}; }
  void save(AutogradContext* ctx) const {
    std::vector<SymInt> all;
    all.reserve(kValues);
    for (const auto* part : {&stride, &padding, &dilation}) all.insert(all.end(), part->begin(), part->end());
    all.push_back(groups);
    ctx->saved_data["geometry"] = all;
  }
  static Geometry load(AutogradContext* ctx) { return of(ctx->saved_data["geometry"].toSymIntVector()); }
  Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    return conv2d_forward_op().call(x, weight, bias, stride, padding, dilation, groups);
  }
  Tensors3 backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                    std::array<bool, 3> output_mask) const {
    return conv2d_backward_op().call(grad_output, x, weight, output_mask[2], stride, padding, dilation, groups,
                                     output_mask);
  }
  Tensor stock(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    return at::convolution_symint(x, weight, optional(bias), stride, padding, dilation, false, {0, 0}, groups);
  }
};

struct Conv {
  Tensor weight, bias;  // the weight may be of floats with activations of fewer bits
  Geometry geometry{};

  Tensor stock(const Tensor& x) const { return geometry.stock(x, weight.to(x.scalar_type()), bias); }
};

struct Norm {
  Tensor weight, bias;
  Tensor running_mean, running_var;  // forward only
  bool training = false;
  double eps = 1e-5;
  Tensor mean, rstd, var;  // of what it normalises; var after a forward pass in training

  Tensor stock(const Tensor& x) const { return stock_norm(x, mean, rstd, weight, bias, training, eps); }
};

// What a convolution reads: x, or act(norm(x)).
struct Operand {
  Tensor x;
  const Norm* norm = nullptr;
  int64_t act = kRelu;
  double negative_slope = kNoSlope;
};

inline OptionalTensor mean_of(const Norm* n) { return n == nullptr ? OptionalTensor() : n->mean; }
inline OptionalTensor rstd_of(const Norm* n) { return n == nullptr ? OptionalTensor() : n->rstd; }
inline OptionalTensor weight_of(const Norm* n) { return n == nullptr ? OptionalTensor() : optional(n->weight); }
inline OptionalTensor bias_of(const Norm* n) { return n == nullptr ? OptionalTensor() : optional(n->bias); }

inline void take_statistics(const Tensor& x, Norm* norm) {
  std::tie(norm->mean, norm->rstd, norm->var) =
      statistics_op().call(x, optional(norm->running_mean), optional(norm->running_var), norm->training, norm->eps);
}

// conv(operand) + bias [+ skip]. Leaves the statistics for the batch norm behind it there, if there is one.
inline Tensor convolve(const Operand& in, const Conv& conv, Norm* behind, const Tensor& skip = {}) {
  const Geometry& g = conv.geometry;
  const bool any = behind != nullptr;
  auto [z, mean, rstd, var] = conv_norm_forward_op().call(
      in.x, mean_of(in.norm), rstd_of(in.norm), weight_of(in.norm), bias_of(in.norm), in.act, in.negative_slope,
      conv.weight, g.stride, g.padding, g.dilation, g.groups, any ? optional(behind->running_mean) : OptionalTensor(),
      any ? optional(behind->running_var) : OptionalTensor(), any && behind->training, any ? behind->eps : Norm{}.eps,
      optional(conv.bias), optional(skip), any);
  if (any) {
    behind->mean = mean;
    behind->rstd = rstd;
    behind->var = var;
  }
  return z;
}

// The gradient of a tensor: dy where `mask` has a bit. With a norm it is the gradient behind that batch norm, whose
// backward pass happens where it is read: z is what the batch norm had, dweight and dbias are its parameters'.
struct Gradient {
  Tensor dy{}, mask{};
  const Norm* norm = nullptr;
  Tensor z{}, dweight{}, dbias{};

  bool training() const { return norm != nullptr && norm->training; }
};

// Of what a convolution read, from that of what it put out; `skip` is added before the activation's derivative.
inline Gradient data_gradient(const Gradient& g, const Conv& conv, const Operand& in, const Tensor& skip = {},
                              const Tensor& skip_mask = {}) {
  const Geometry& at = conv.geometry;
  auto [dx, dweight, dbias] = conv_norm_backward_data_op().call(
      g.dy, optional(g.mask), optional(g.z), mean_of(g.norm), rstd_of(g.norm), weight_of(g.norm), optional(g.dweight),
      optional(g.dbias), g.training(), conv.weight, in.x, mean_of(in.norm), rstd_of(in.norm), weight_of(in.norm),
      bias_of(in.norm), in.act, in.negative_slope, optional(skip), optional(skip_mask), at.stride, at.padding,
      at.dilation, at.groups);
  return {dx, {}, in.norm, in.norm == nullptr ? Tensor() : in.x, dweight, dbias};
}

// Of the weight, and of the bias if the convolution has one.
inline std::tuple<Tensor, Tensor> weight_gradient(const Gradient& g, const Conv& conv, const Operand& in) {
  const Geometry& at = conv.geometry;
  auto [dweight, dbias] = conv_norm_backward_weight_op().call(
      g.dy, optional(g.mask), optional(g.z), mean_of(g.norm), rstd_of(g.norm), weight_of(g.norm), optional(g.dweight),
      optional(g.dbias), g.training(), conv.weight, in.x, mean_of(in.norm), rstd_of(in.norm), weight_of(in.norm),
      bias_of(in.norm), in.act, in.negative_slope, at.stride, at.padding, at.dilation, at.groups, conv.bias.defined());
  return {dweight, conv.bias.defined() ? parameter_grad(dbias, conv.bias) : Tensor()};
}

// Both of them, and of no bias: what both read is read once where that is faster.
inline std::pair<Gradient, Tensor> both_gradients(const Gradient& g, const Conv& conv, const Operand& in,
                                                  const Tensor& skip = {}, const Tensor& skip_mask = {}) {
  const Geometry& at = conv.geometry;
  auto [dx, dweight, dbias, dw, unused] = conv_norm_backward_op().call(
      g.dy, optional(g.mask), optional(g.z), mean_of(g.norm), rstd_of(g.norm), weight_of(g.norm), optional(g.dweight),
      optional(g.dbias), g.training(), conv.weight, in.x, mean_of(in.norm), rstd_of(in.norm), weight_of(in.norm),
      bias_of(in.norm), in.act, in.negative_slope, optional(skip), optional(skip_mask), at.stride, at.padding,
      at.dilation, at.groups, /*has_conv_bias=*/false);
  return {{dx, {}, in.norm, in.norm == nullptr ? Tensor() : in.x, dweight, dbias}, dw};
}

// The backward pass of g's batch norm by itself [+ skip].
inline Tensor input_gradient(const Gradient& g, const Tensor& skip = {}) {
  return input_gradient_op().call(g.dy, g.z, g.norm->mean, g.norm->rstd, optional(g.norm->weight), g.dweight, g.dbias,
                                  g.norm->training, optional(skip));
}

}  // namespace fused_resnet::bindings
