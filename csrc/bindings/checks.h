// What arguments must be. Every check names the operator, the argument, what is
// expected and what came. They read only sizes, dtypes and devices, as symbolic
// values where a compiler traces, and run before any state is touched.
//
// ValueError where stock PyTorch says ValueError; else RuntimeError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>

#include "fused_resnet/types.h"

namespace fused_resnet::bindings::check {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

inline bool supported_dtype(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

// Statistics and per-channel arithmetic: float, or double for double.
inline at::ScalarType stat_dtype(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

inline void device(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.device() == x.device(), op, ": expected ", name, " on the device of x, ", x.device(), ", got ",
              t.device());
}

inline void activation_tensor(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.defined(), op, ": expected ", name, " to be a tensor, got None");
  TORCH_CHECK(supported_dtype(x.scalar_type()), op, ": expected ", name,
              " to be float64, float32, bfloat16 or float16, got ", x.scalar_type());
  TORCH_CHECK(x.layout() == at::kStrided, op, ": expected ", name, " to be a dense tensor, got layout ", x.layout());
  TORCH_CHECK(x.dim() >= 2, op, ": expected ", name, " of shape (N, C, ...), got ", x.sym_sizes());
}

inline void dimensions(const char* op, const char* name, const at::Tensor& x, int64_t dim, const char* expected) {
  TORCH_CHECK(x.dim() == dim, op, ": expected ", name, " of shape ", expected, ", got ", x.sym_sizes());
}

// `t` must be usable where `x` is: same shape, dtype and device.
inline void same(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.defined(), op, ": expected ", name, " to be a tensor, got None");
  device(op, name, t, x);
  TORCH_CHECK(t.sym_sizes().equals(x.sym_sizes()), op, ": expected ", name, " of shape ", x.sym_sizes(), ", got ",
              t.sym_sizes());
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": expected ", name, " of dtype ", x.scalar_type(), ", got ",
              t.scalar_type());
  TORCH_CHECK(t.layout() == at::kStrided, op, ": expected ", name, " to be a dense tensor, got layout ", t.layout());
}

// A (C,) parameter or statistic: in the dtype of x, or in that of its statistics.
inline void channel(const char* op, const char* name, const OptionalTensor& t, const at::Tensor& x) {
  if (!given(t)) return;
  device(op, name, *t, x);
  TORCH_CHECK(t->dim() == 1 && t->sym_size(0) == x.sym_size(1), op, ": expected ", name, " of shape (", x.sym_size(1),
              ",), got ", t->sym_sizes());
  const at::ScalarType dtype = t->scalar_type();
  TORCH_CHECK(dtype == x.scalar_type() || dtype == stat_dtype(x.scalar_type()), op, ": expected ", name, " of dtype ",
              stat_dtype(x.scalar_type()), " with x of dtype ", x.scalar_type(), ", got ", dtype);
  TORCH_CHECK(t->layout() == at::kStrided, op, ": expected ", name, " to be a dense tensor, got layout ", t->layout());
}

// A (C,) statistic as the device operators hand it on.
inline void statistic(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.defined(), op, ": expected ", name, " to be a tensor, got None");
  channel(op, name, t, x);
  TORCH_CHECK(t.scalar_type() == stat_dtype(x.scalar_type()), op, ": expected ", name, " of dtype ",
              stat_dtype(x.scalar_type()), ", got ", t.scalar_type());
}

inline c10::SymInt per_channel(const at::Tensor& x) {
  c10::SymInt count = x.sym_size(0);
  for (int64_t i = 2; i < x.dim(); ++i) count *= x.sym_size(i);
  return count;
}

inline void activation(const char* op, const OptionalTensor& act_weight, int64_t act, const at::Tensor& x) {
  TORCH_CHECK_VALUE(act >= 0 && act < kActivationCount, op, ": expected act from 0 to ", kActivationCount - 1, ", got ",
                    act);
  const bool prelu = act == static_cast<int64_t>(Activation::kPrelu);
  TORCH_CHECK_VALUE(given(act_weight) == prelu, op, ": expected act_weight with act='prelu' and only then, got ",
                    given(act_weight) ? "a tensor" : "None");
  channel(op, "act_weight", act_weight, x);
}

struct NormNames {
  const char *weight, *bias, *running_mean, *running_var, *eps;
};
inline constexpr NormNames kNorm{"weight", "bias", "running_mean", "running_var", "eps"};
inline constexpr NormNames kResidualNorm{"residual_weight", "residual_bias", "residual_running_mean",
                                         "residual_running_var", "residual_eps"};

inline void norm(const char* op, const NormNames& names, const at::Tensor& x, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                 bool training, double eps) {
  TORCH_CHECK_VALUE(eps > 0 && eps <= std::numeric_limits<double>::max(), op, ": expected ", names.eps, " > 0, got ",
                    eps);
  channel(op, names.weight, weight, x);
  channel(op, names.bias, bias, x);
  channel(op, names.running_mean, running_mean, x);
  channel(op, names.running_var, running_var, x);
  if (training) {
    TORCH_CHECK(given(running_mean) == given(running_var), op, ": expected ", names.running_mean, " and ",
                names.running_var, " both or neither, got ", given(running_mean) ? "the first" : "the second",
                " alone");
    TORCH_CHECK(!given(running_mean) || running_mean->scalar_type() == running_var->scalar_type(), op, ": expected ",
                names.running_var, " of the dtype of ", names.running_mean, ", got another");
    TORCH_CHECK_VALUE(per_channel(x) != 1, op,
                      ": Expected more than 1 value per channel when training, got input size ", x.sym_sizes());
  } else {
    TORCH_CHECK(given(running_mean) && given(running_var), op, ": expected ", names.running_mean, " and ",
                names.running_var, " when not training, got None");
  }
}

struct ConvNames {
  const char *weight, *bias;
};
inline constexpr ConvNames kConv{"weight", "bias"};
inline constexpr ConvNames kFusedConv{"conv_weight", "conv_bias"};

// What a two-element geometry argument must be.
inline void pair(const char* op, const char* name, c10::SymIntArrayRef values, int64_t least) {
  TORCH_CHECK(values.size() == 2, op, ": expected ", name, " to be two integers, got ", values);
  for (const c10::SymInt& value : values) {
    TORCH_CHECK(value >= least, op, ": expected ", name, " of at least ", least, ", got ", values);
    TORCH_CHECK(value <= std::numeric_limits<int32_t>::max() / 2, op, ": expected ", name, " below 2^30, got ", values);
  }
}

// Whether a weight of float32 may come with activations of fewer bits.
enum class WeightDtype : uint8_t { kAsX, kAsXOrFloat };

inline void conv2d(const char* op, const ConvNames& names, const at::Tensor& x, const at::Tensor& weight,
                   const OptionalTensor& bias, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                   c10::SymIntArrayRef dilation, const c10::SymInt& groups, WeightDtype allowed = WeightDtype::kAsX) {
  activation_tensor(op, "x", x);
  dimensions(op, "x", x, 4, "(N, C, H, W)");
  TORCH_CHECK(weight.defined(), op, ": expected ", names.weight, " to be a tensor, got None");
  device(op, names.weight, weight, x);
  dimensions(op, names.weight, weight, 4, "(O, C / groups, KH, KW)");
  const bool wider = allowed == WeightDtype::kAsXOrFloat && weight.scalar_type() == at::kFloat && x.element_size() == 2;
  TORCH_CHECK(wider || weight.scalar_type() == x.scalar_type(), op, ": expected ", names.weight, " of dtype ",
              x.scalar_type(), allowed == WeightDtype::kAsX || x.element_size() != 2 ? "" : " or Float", ", got ",
              weight.scalar_type());
  pair(op, "stride", stride, 1);
  pair(op, "padding", padding, 0);
  pair(op, "dilation", dilation, 1);
  TORCH_CHECK(groups >= 1, op, ": expected groups of at least 1, got ", groups);
  TORCH_CHECK(x.sym_size(1) % groups == 0, op, ": expected groups that divide the ", x.sym_size(1),
              " channels of x, got ", groups);
  TORCH_CHECK(weight.sym_size(0) % groups == 0, op, ": expected groups that divide the ", weight.sym_size(0),
              " output channels of ", names.weight, ", got ", groups);
  TORCH_CHECK(weight.sym_size(1) * groups == x.sym_size(1), op, ": expected ", names.weight, " of ",
              x.sym_size(1) / groups, " input channels (", x.sym_size(1), " of x in ", groups, " groups), got shape ",
              weight.sym_sizes());
  for (int64_t i = 0; i < 2; ++i) {
    const c10::SymInt kernel = weight.sym_size(2 + i);
    TORCH_CHECK(kernel >= 1, op, ": expected ", names.weight, " with a kernel of at least 1x1, got shape ",
                weight.sym_sizes());
    const c10::SymInt padded = x.sym_size(2 + i) + padding[i] * 2;
    TORCH_CHECK((kernel - 1) * dilation[i] + 1 <= padded, op, ": expected a kernel no larger than the padded x, got ",
                names.weight, " of shape ", weight.sym_sizes(), " with dilation ", dilation, " and x of shape ",
                x.sym_sizes(), " with padding ", padding);
  }
  if (given(bias)) {
    device(op, names.bias, *bias, x);
    TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), op, ": expected ", names.bias,
                " of shape (", weight.sym_size(0), ",), got ", bias->sym_sizes());
    TORCH_CHECK(bias->scalar_type() == x.scalar_type(), op, ": expected ", names.bias, " of dtype ", x.scalar_type(),
                ", got ", bias->scalar_type());
  }
}

inline void status(const char* op, const Status& status) { TORCH_CHECK(status.ok(), op, ": ", status.message); }

}  // namespace fused_resnet::bindings::check
