// Convolution with what stands before and after it in a residual network folded in: the contract.
//
//   forward    y  = conv(a, weight) + bias [+ skip],   a = x or act(norm(x));   statistics of y for the next batch norm
//   backward   da = conv'(dz) [+ skip],  dz = dy or the gradient through y's batch norm;  dx = da or
//              dx = act'(norm(x)) * da with the two sums that x's own batch norm needs
//              dweight = dz * a, with both operands recomputed while they are packed
//
// All activations are NHWC and dense. Formulas: docs/convolution.md and docs/batch_norm_math.md.
#pragma once

#include <cstddef>

#include "fused_resnet/batch_norm.h"
#include "fused_resnet/types.h"

namespace fused_resnet {

// The forward problem; backward passes are told by the same one.
struct ConvShape {
  int64_t n = 0, h = 0, w = 0, c = 0;  // x: (n, h, w, c)
  int64_t k = 0, r = 1, s = 1;         // weight: (k, c / groups, r, s)
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;
  DType dtype = DType::kFloat32;

  int64_t out_h() const { return (h + 2 * pad_h - dilation_h * (r - 1) - 1) / stride_h + 1; }
  int64_t out_w() const { return (w + 2 * pad_w - dilation_w * (s - 1) - 1) / stride_w + 1; }
  int64_t x_numel() const { return n * h * w * c; }
  int64_t y_numel() const { return n * out_h() * out_w() * k; }
  int64_t macs() const { return y_numel() * (c / groups) * r * s; }
};

// (k, c / groups, r, s) with any strides, in elements; of the problem's dtype, or of float32 with a problem of bfloat16
// or float16: as a parameter is under autocast. Kernels that multiply bfloat16 round it while they pack it.
struct ConvWeight {
  const void* data = nullptr;
  int64_t stride_k = 0, stride_c = 0, stride_r = 0, stride_s = 0;
  bool is_float = false;
};

// What x is before it is convolved: itself, or act(norm(x)) with statistics that are read.
struct ConvInput {
  const void* data = nullptr;
  bool has_norm = false;
  NormParams norm;
  ActParams act;
};

// What dy is before it is convolved: itself, or, with has_norm, the gradient through the batch norm of y:
//   dz = scale * (g - dbias / M - xhat * dweight / M),   g = dy, or dy where `mask` has a bit
// and scale * g with fixed statistics. norm.batch_stats says which.
struct ConvGradient {
  const void* data = nullptr;
  const uint8_t* mask = nullptr;  // nullable; batch_norm_act_mask_bytes() of y's shape
  bool has_norm = false;
  const void* z = nullptr;  // y of the forward pass, before its batch norm
  NormParams norm;          // mean and rstd are read
  const void* dweight = nullptr;
  const void* dbias = nullptr;  // (k,) stat dtype: gradients of the batch norm, known before this pass
};

// How floats may be multiplied. Errors of each: docs/numerics.md.
struct ConvNumerics {
  bool allow_winograd = true;       // fewer multiplications
  int split = 3;                    // bfloat16 parts of a float, for AMX: 3, 2, or 0 to leave floats whole
  bool split_where_faster = false;  // floats stay whole where splitting them was not measured to be faster
};

struct ConvForward {
  ConvShape shape;
  ConvInput x;
  ConvWeight weight;
  const void* packed = nullptr;  // nullable: what conv_pack() made of this weight; `weight` is still read
  const void* bias = nullptr;    // (k,) stat dtype, nullable
  const void* skip = nullptr;    // of y's shape, nullable: y = act(conv + bias + skip)
  ActParams act;                 // identity with `stats`
  void* y = nullptr;             // (n, out_h, out_w, k); may be `skip`
  NormParams stats;              // batch_stats: mean, rstd and var of y are written
  ConvNumerics numerics;
  void* workspace = nullptr;  // conv_forward_workspace() bytes, 64-byte aligned
  Runner runner;
};

// A weight in the order in which forward passes of `shape` read it, for those that it serves many times.
struct ConvPack {
  ConvShape shape;
  ConvWeight weight;
  ConvNumerics numerics;
  void* packed = nullptr;  // conv_packed_bytes() bytes, 64-byte aligned
  Runner runner;
};

// `x.data` is read only where x.has_norm. With has_norm dx is the gradient at norm(x), after the activation's
// derivative, and dweight and dbias are its sums.
struct ConvBackwardData {
  ConvShape shape;
  ConvGradient dy;
  ConvWeight weight;
  ConvInput x;
  void* dweight = nullptr;  // (c,) stat dtype, nullable: gradients of x.norm
  void* dbias = nullptr;
  const void* skip = nullptr;          // of x's shape, nullable: added to da
  const uint8_t* skip_mask = nullptr;  // nullable: the skip's elements without a bit count as zero
  void* dx = nullptr;
  ConvNumerics numerics;
  void* workspace = nullptr;
  Runner runner;
};

struct ConvBackwardWeight {
  ConvShape shape;
  ConvGradient dy;
  ConvInput x;
  void* dweight = nullptr;  // (k, c / groups, r, s) in the strides and of the dtype of `layout`
  ConvWeight layout;        // data unused
  void* dbias = nullptr;    // (k,) stat dtype, nullable: sum of dz
  ConvNumerics numerics;
  void* workspace = nullptr;
  Runner runner;
};

namespace cpu {
enum class ConvDirection : uint8_t { kForward, kForwardPacked, kBackwardData };
// How a pass would be computed, as text: kernels, units of work. Cut off at `size`.
void conv_plan(const ConvShape& shape, ConvDirection direction, const ConvNumerics& numerics, char* text, size_t size);
// Whether that is a product for every tap, in vector registers: neither Winograd's nor of floats in parts.
bool conv_is_direct(const ConvShape& shape, ConvDirection direction, const ConvNumerics& numerics);
// The kernel of a weight gradient.
const char* conv_weight_plan(const ConvShape& shape, const ConvNumerics& numerics);
// Whether the kernels of this file take the problem at all; where not, the caller has another convolution.
bool conv_supported(const ConvShape& shape);
int64_t conv_forward_workspace(const ConvShape& shape, const ConvNumerics& numerics, int threads, bool packed = false);
// Problems of one weight and dtype share what is packed where the formats are equal, in words. Cut off at `size`.
void conv_packed_format(const ConvShape& shape, const ConvNumerics& numerics, char* text, size_t size);
int64_t conv_packed_bytes(const ConvShape& shape, const ConvNumerics& numerics);
// Whether a forward pass with this packed weight may read the weight as well, for values that its way cannot compute.
bool conv_reads_weight(const ConvShape& shape, const ConvNumerics& numerics, const void* packed);
Status conv_pack(const ConvPack& p);
int64_t conv_backward_data_workspace(const ConvShape& shape, const ConvNumerics& numerics, int threads);
int64_t conv_backward_weight_workspace(const ConvShape& shape, const ConvNumerics& numerics, int threads);
Status conv_forward(const ConvForward& p);
Status conv_backward_data(const ConvBackwardData& p);
Status conv_backward_weight(const ConvBackwardWeight& p);
// Both, of one problem, gradient, runner and numerics, to the same bits (but of a dz below bfloat16's normal numbers,
// and NaNs' own). They run side by side where conv_runs_together(); elsewhere they may share one workspace.
Status conv_backward(const ConvBackwardData& data, const ConvBackwardWeight& weight);
bool conv_runs_together(const ConvShape& shape, const ConvNumerics& numerics, int threads);
}  // namespace cpu

}  // namespace fused_resnet
