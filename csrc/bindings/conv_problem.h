// How the bindings see a convolution on the CPU: the seam's problem, and whether its kernels take it.
#pragma once

#include <ATen/core/Tensor.h>

#include "bindings/plan.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::bindings {

constexpr at::MemoryFormat kChannelsLast = at::MemoryFormat::ChannelsLast;

inline at::Tensor nhwc(const at::Tensor& t) { return t.contiguous(kChannelsLast); }

// Stride, padding and dilation (rows, columns) and groups of one convolution, as operators take them.
struct ConvGeometry {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups = 1;
};

// `dtype`: of the activations.
inline ConvShape conv_shape(at::IntArrayRef x, const at::Tensor& weight, const ConvGeometry& g, at::ScalarType dtype) {
  ConvShape s;
  s.n = x[0];
  s.c = x[1];
  s.h = x[2];
  s.w = x[3];
  s.k = weight.size(0);
  s.r = weight.size(2);
  s.s = weight.size(3);
  s.stride_h = g.stride[0];
  s.stride_w = g.stride[1];
  s.pad_h = g.padding[0];
  s.pad_w = g.padding[1];
  s.dilation_h = g.dilation[0];
  s.dilation_w = g.dilation[1];
  s.groups = g.groups;
  s.dtype = to_dtype(dtype);
  return s;
}
inline ConvShape conv_shape(at::IntArrayRef x, const at::Tensor& weight, const ConvGeometry& g) {
  return conv_shape(x, weight, g, weight.scalar_type());
}

inline ConvWeight conv_weight(const at::Tensor& w) {
  return {read(w), w.stride(0), w.stride(1), w.stride(2), w.stride(3), w.scalar_type() == at::kFloat};
}

inline std::array<int64_t, 4> conv_output_sizes(const ConvShape& s) { return {s.n, s.k, s.out_h(), s.out_w()}; }

// The batch norm behind a convolution of x, before anything is computed or changed.
void check_conv_norm(const char* op, const at::Tensor& x, const at::Tensor& conv_weight,
                     const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
                     bool training, double eps);

// Whether the kernels are measured to be faster than ATen's convolution (bench/README.md): the plan. It reads what a
// tracing compiler knows: nothing of x but its device, its layout and that it is not empty.
bool own_convolution(const at::Tensor& x, const at::Tensor& weight, c10::SymIntArrayRef stride,
                     c10::SymIntArrayRef dilation, const c10::SymInt& groups);

// Positions of x: whether there are more of them is all that own_groups() asks of its extent.
constexpr int64_t kSmallImage = 14 * 14;

// Whether groups are of a size whose kernels are faster than ATen's convolution and the passes that they save:
// docs/convolution.md.
bool own_groups(const ConvShape& s, bool packed = false);

// Whether ATen's convolution is the faster one of a problem that is ours but has nothing to fuse: docs/convolution.md.
bool aten_faster_alone(const ConvShape& s, cpu::ConvDirection direction);

// Winograd's convolution in single precision, for the whole process: docs/numerics.md.
void set_winograd(bool allowed);
bool winograd();
// What the process and PyTorch's precision allow now.
ConvNumerics numerics();
// Floats as sums of bfloat16 on AMX, likewise.
void set_split_bfloat16(std::optional<bool> allowed);  // none: where it pays
std::optional<bool> split_bfloat16();

// y = conv2d(x, weight) + bias and its gradients by the kernels; x is channels_last and own_convolution() said yes.
at::Tensor own_forward(const char* op, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const ConvGeometry& g);
at::Tensor own_backward_data(const char* op, const at::Tensor& grad_output, at::IntArrayRef x_sizes,
                             const at::Tensor& weight, const ConvGeometry& g);
std::pair<at::Tensor, at::Tensor> own_backward_weight(const char* op, const at::Tensor& grad_output,
                                                      const at::Tensor& x, const at::Tensor& weight, bool bias,
                                                      const ConvGeometry& g);

}  // namespace fused_resnet::bindings
