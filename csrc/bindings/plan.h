// How the bindings see an activation tensor: its extent and layout for the seam,
// and the memory format of everything shaped like it. ops/_fake.py repeats these
// decisions for tracing.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "bindings/backend.h"
#include "bindings/checks.h"
#include "bindings/memory.h"
#include "fused_resnet/batch_norm.h"
#include "fused_resnet/types.h"

namespace fused_resnet::bindings {

inline DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

struct Plan {
  at::Tensor x;  // dense in memory_format: the caller's tensor, or a copy where it had gaps
  at::MemoryFormat memory_format;
  Shape shape;

  explicit Plan(const at::Tensor& input) : memory_format(input.suggest_memory_format()) {
    x = input.contiguous(memory_format);
    shape.n = input.size(0);
    shape.c = input.size(1);
    shape.s = 1;
    for (int64_t i = 2; i < input.dim(); ++i) shape.s *= input.size(i);
    shape.dtype = to_dtype(input.scalar_type());
    // With one position per image both layouts are the same memory; NHWC has the longer rows.
    const bool channels_last = memory_format != at::MemoryFormat::Contiguous || shape.s == 1;
    shape.layout = channels_last ? Layout::kNHWC : Layout::kNCHW;
  }

  // `t`, of x's shape, in x's layout: copied only where it is in another.
  at::Tensor in_layout(const at::Tensor& t) const { return t.contiguous(memory_format); }
  at::Tensor empty() const { return empty_pooled(x.sizes(), x.options(), memory_format); }
  at::Tensor empty_stat(int64_t size) const {
    return at::empty({size}, x.options().dtype(check::stat_dtype(x.scalar_type())));
  }
  at::Tensor none() const { return at::empty({0}, x.options()); }
  at::Tensor bytes(int64_t size) const { return empty_pooled({size}, x.options().dtype(at::kByte)); }
  // A (C,) operand as the seam wants it; undefined stays undefined.
  at::Tensor stat(const std::optional<at::Tensor>& t) const {
    if (!check::given(t)) return {};
    return t->to(check::stat_dtype(x.scalar_type())).contiguous();
  }
};

inline const void* read(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* write(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
// mean and rstd are one field of the seam, read or written.
inline void* read_field(const at::Tensor& t) { return const_cast<void*>(read(t)); }

// Every (C,) tensor behind a NormParams, kept alive until the kernel is done.
struct NormOperands {
  at::Tensor weight, bias, mean, rstd;
  at::Tensor var;     // defined where the forward pass computes the statistics
  double eps = 1e-5;  // only that pass reads it

  NormParams params(bool batch_stats) const {
    NormParams p;
    p.batch_stats = batch_stats;
    p.eps = eps;
    p.weight = read(weight);
    p.bias = read(bias);
    p.mean = var.defined() ? write(mean) : read_field(mean);
    p.rstd = var.defined() ? write(rstd) : read_field(rstd);
    p.var = write(var);
    return p;
  }
  // The statistics of no elements at all.
  void clear_batch_stats() const {
    if (!var.defined()) return;
    for (const at::Tensor& t : {mean, rstd, var}) t.zero_();
  }
};

// Operands of a pass that reads the statistics of an earlier one.
inline NormOperands saved_operands(const Plan& plan, const at::Tensor& mean, const at::Tensor& rstd,
                                   const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias) {
  NormOperands o;
  o.weight = plan.stat(weight);
  o.bias = plan.stat(bias);
  o.mean = mean.contiguous();
  o.rstd = rstd.contiguous();
  return o;
}

// Operands of a forward pass. Without batch statistics mean and rstd are copies, so that a later training step cannot
// change what backward of this one reads.
inline NormOperands forward_operands(const Execution& on, const Plan& plan, const std::optional<at::Tensor>& weight,
                                     const std::optional<at::Tensor>& bias,
                                     const std::optional<at::Tensor>& running_mean,
                                     const std::optional<at::Tensor>& running_var, bool training, double eps) {
  NormOperands o;
  const int64_t c = plan.shape.c;
  o.weight = plan.stat(weight);
  o.bias = plan.stat(bias);
  o.eps = eps;
  o.mean = plan.empty_stat(c);
  o.rstd = plan.empty_stat(c);
  if (training) {
    o.var = plan.empty_stat(c);
    return o;
  }
  const at::Tensor mean = plan.stat(running_mean), var = plan.stat(running_var);
  BatchNormFixedStats p;
  p.c = c;
  p.dtype = plan.shape.dtype;
  p.eps = eps;
  p.running_mean = read(mean);
  p.running_var = read(var);
  p.mean = write(o.mean);
  p.rstd = write(o.rstd);
  if (c > 0) on.run(&Backend::fixed_stats, p);
  return o;
}

inline ActParams act_params(int64_t act, double negative_slope, const at::Tensor& slope) {
  ActParams p;
  p.kind = static_cast<Activation>(act);
  p.negative_slope = negative_slope;
  p.slope = read(slope);
  return p;
}

// relu and leaky_relu: their derivative is one bit.
inline bool has_mask(int64_t act) {
  return act == static_cast<int64_t>(Activation::kRelu) || act == static_cast<int64_t>(Activation::kLeakyRelu);
}

}  // namespace fused_resnet::bindings
