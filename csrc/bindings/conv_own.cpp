// Convolutions without batch norms around them, by the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <utility>

#include "bindings/conv_problem.h"
#include "bindings/conv_run.h"
#include "bindings/ops.h"

namespace fused_resnet::bindings {

bool own_groups(const ConvShape& s, bool packed) {
  constexpr int64_t kLeast = 4, kFull = 16;
  const int64_t group = s.c / s.groups;
  const bool whole = s.c == s.k && group >= kLeast && (group & (group - 1)) == 0;
  // Groups that fill a vector are no faster than ATen's where a whole image is in cache, unless their weights are
  // packed.
  const bool small = !packed && group >= kFull && s.h * s.w <= kSmallImage && s.stride_h == 1 && s.stride_w == 1;
  return s.groups == 1 || (whole && !small);
}

bool own_convolution(const Tensor& x, const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef dilation,
                     const SymInt& groups) {
  if (!x.is_cpu() || x.suggest_memory_format() != kChannelsLast || x.sym_numel() == 0 || weight.sym_numel() == 0) {
    return false;
  }
  const auto value = [](const SymInt& i) { return i.guard_int(__FILE__, __LINE__); };
  ConvShape s;
  s.k = value(weight.sym_size(0));
  s.groups = value(groups);
  s.c = value(weight.sym_size(1)) * s.groups;
  s.r = value(weight.sym_size(2));
  s.s = value(weight.sym_size(3));
  s.stride_h = value(stride[0]);
  s.stride_w = value(stride[1]);
  s.dilation_h = value(dilation[0]);
  s.dilation_w = value(dilation[1]);
  if (s.groups != 1) {
    s.h = value(x.sym_size(2));
    s.w = value(x.sym_size(3));
  }
  // Measured: few channels are packed one by one, which a kernel as large as a ResNet's stem outweighs and smaller ones
  // do not.
  const int64_t taps = s.r * s.s;
  const bool narrow = (s.c < 8 && taps <= 16) || (s.c < 16 && s.c * taps > 512);
  return !narrow && own_groups(s) && cpu::conv_supported(s);
}

Tensor own_forward(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvGeometry& g) {
  const Execution on(op, x);
  const ConvShape s = conv_shape(x.sizes(), weight, g);
  const Tensor dense = nhwc(x);
  const Plan plan(dense);
  const Tensor b = bias.defined() ? plan.stat(bias) : Tensor();
  const Tensor y = empty_pooled(conv_output_sizes(s), x.options(), kChannelsLast);
  ConvForward p;
  p.shape = s;
  p.x.data = read(dense);
  p.weight = conv_weight(weight);
  p.bias = read(b);
  p.y = write(y);
  run(on, op, p);
  return y;
}

Tensor own_backward_data(const char* op, const Tensor& grad_output, at::IntArrayRef x_sizes, const Tensor& weight,
                         const ConvGeometry& g) {
  const Execution on(op, grad_output);
  const ConvShape s = conv_shape(x_sizes, weight, g);
  const Tensor dy = nhwc(grad_output);
  const Tensor dx = empty_pooled(x_sizes, grad_output.options(), kChannelsLast);
  ConvBackwardData p;
  p.shape = s;
  p.dy.data = read(dy);
  p.weight = conv_weight(weight);
  p.dx = write(dx);
  run(on, op, p);
  return dx;
}

std::pair<Tensor, Tensor> own_backward_weight(const char* op, const Tensor& grad_output, const Tensor& x,
                                              const Tensor& weight, bool bias, const ConvGeometry& g) {
  const Execution on(op, x);
  const ConvShape s = conv_shape(x.sizes(), weight, g);
  const Tensor dy = nhwc(grad_output), dense = nhwc(x);
  const Plan plan(dense);
  const Tensor dw = at::empty_like(weight, weight.options(), weight.suggest_memory_format());
  const Tensor db = plan.empty_stat(bias ? s.k : 0);
  ConvBackwardWeight p;
  p.shape = s;
  p.dy.data = read(dy);
  p.x.data = read(dense);
  p.layout = conv_weight(dw);
  p.dweight = write(dw);
  p.dbias = bias ? write(db) : nullptr;
  run(on, op, p);
  return {dw, db};
}

}  // namespace fused_resnet::bindings
