// The registered operators as C++ calls them: through the dispatcher, so that
// tracing, autocast and fake tensors see them. Handles are looked up once.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <tuple>

namespace fused_resnet::bindings {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using OptionalTensor = std::optional<Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Argument names are in schemas.h.
using ForwardFn = Tensors8(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& residual, const OptionalTensor& residual_weight,
                           const OptionalTensor& residual_bias, const OptionalTensor& residual_running_mean,
                           const OptionalTensor& residual_running_var, const OptionalTensor& act_weight, bool training,
                           bool residual_norm, bool residual_training, double eps, double residual_eps, int64_t act,
                           double negative_slope, bool save_mask);
using ApplyFn = Tensor(const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& act_weight, int64_t act,
                       double negative_slope);
using BackwardFn = Tensors7(const Tensor& grad_output, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                            const OptionalTensor& residual_mean, const OptionalTensor& residual_rstd,
                            const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
                            const OptionalTensor& act_weight, const OptionalTensor& mask, bool training,
                            bool residual_training, int64_t act, double negative_slope,
                            std::array<bool, 7> output_mask);
using AddFn = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const Tensor& residual, const OptionalTensor& residual_mean,
                                         const OptionalTensor& residual_rstd, const OptionalTensor& residual_weight,
                                         const OptionalTensor& residual_bias, int64_t act, double negative_slope,
                                         bool save_mask);
using ConvNormForwardFn = Tensors4(const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd,
                                   const OptionalTensor& weight, const OptionalTensor& bias, int64_t act,
                                   double negative_slope, const Tensor& conv_weight, SymIntArrayRef stride,
                                   SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                                   const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                   double eps, const OptionalTensor& conv_bias, const OptionalTensor& skip,
                                   bool statistics);
using StatisticsFn = Tensors3(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              bool training, double eps);
using InputGradientFn = Tensor(const Tensor& grad_output, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                               const OptionalTensor& weight, const Tensor& grad_weight, const Tensor& grad_bias,
                               bool training, const OptionalTensor& skip);
using ConvNormBackwardDataFn = Tensors3(const Tensor& grad_output, const OptionalTensor& mask, const OptionalTensor& z,
                                        const OptionalTensor& z_mean, const OptionalTensor& z_rstd,
                                        const OptionalTensor& z_weight, const OptionalTensor& grad_z_weight,
                                        const OptionalTensor& grad_z_bias, bool training, const Tensor& conv_weight,
                                        const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd,
                                        const OptionalTensor& weight, const OptionalTensor& bias, int64_t act,
                                        double negative_slope, const OptionalTensor& skip,
                                        const OptionalTensor& skip_mask, SymIntArrayRef stride, SymIntArrayRef padding,
                                        SymIntArrayRef dilation, SymInt groups);
using ConvNormBackwardWeightFn = std::tuple<Tensor, Tensor>(
    const Tensor& grad_output, const OptionalTensor& mask, const OptionalTensor& z, const OptionalTensor& z_mean,
    const OptionalTensor& z_rstd, const OptionalTensor& z_weight, const OptionalTensor& grad_z_weight,
    const OptionalTensor& grad_z_bias, bool training, const Tensor& conv_weight, const Tensor& x,
    const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
    int64_t act, double negative_slope, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
    SymInt groups, bool has_conv_bias);
using ConvNormBackwardFn = Tensors5(const Tensor& grad_output, const OptionalTensor& mask, const OptionalTensor& z,
                                    const OptionalTensor& z_mean, const OptionalTensor& z_rstd,
                                    const OptionalTensor& z_weight, const OptionalTensor& grad_z_weight,
                                    const OptionalTensor& grad_z_bias, bool training, const Tensor& conv_weight,
                                    const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd,
                                    const OptionalTensor& weight, const OptionalTensor& bias, int64_t act,
                                    double negative_slope, const OptionalTensor& skip, const OptionalTensor& skip_mask,
                                    SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                                    SymInt groups, bool has_conv_bias);
using ResidualBlockFn = std::vector<Tensor>(const Tensor& x, at::TensorList conv_weights,
                                            const c10::List<OptionalTensor>& weights,
                                            const c10::List<OptionalTensor>& biases,
                                            const c10::List<OptionalTensor>& running_means,
                                            const c10::List<OptionalTensor>& running_vars, c10::List<bool> training,
                                            at::ArrayRef<double> eps, SymIntArrayRef geometry, bool downsample,
                                            bool recompute, bool preact);
using UpdateFn = void(Tensor& running_mean, Tensor& running_var, const Tensor& mean, const Tensor& var, SymInt count,
                      double momentum);
using PoolForwardFn = Tensors5(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& act_weight, bool training, double eps, int64_t act,
                               double negative_slope, bool save_argmax);
using PoolBackwardFn = Tensors4(const Tensor& grad_output, const Tensor& x, const Tensor& argmax, const Tensor& mean,
                                const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& act_weight, bool training, int64_t act, double negative_slope,
                                std::array<bool, 4> output_mask);
using Conv2dFn = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, SymIntArrayRef stride,
                        SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups);
using Conv2dBackwardFn = Tensors3(const Tensor& grad_output, const Tensor& x, const Tensor& weight, bool has_bias,
                                  SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups,
                                  std::array<bool, 3> output_mask);

using BatchNormActFn = Tensor(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                              const OptionalTensor& act_weight, bool training, double momentum, double eps, int64_t act,
                              double negative_slope);
using DualFn = Tensor(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& residual,
                      const OptionalTensor& residual_running_mean, const OptionalTensor& residual_running_var,
                      const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
                      const OptionalTensor& act_weight, bool training, double momentum, double eps,
                      bool residual_training, double residual_momentum, double residual_eps, int64_t act,
                      double negative_slope);
using BatchNormActConvFn = Tensor(const Tensor& x, const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var, const OptionalTensor& weight,
                                  const OptionalTensor& bias, const OptionalTensor& act_weight, bool training,
                                  double momentum, double eps, int64_t act, double negative_slope,
                                  const Tensor& conv_weight, const OptionalTensor& conv_bias, SymIntArrayRef stride,
                                  SymIntArrayRef padding, SymIntArrayRef dilation, SymInt groups);
using MaxPoolFn = Tensor(const Tensor& x, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& act_weight,
                         bool training, double momentum, double eps, int64_t act, double negative_slope);
using AddActFn = Tensor(const Tensor& x, const Tensor& residual, const OptionalTensor& act_weight, int64_t act,
                        double negative_slope);

template <typename Fn>
c10::TypedOperatorHandle<Fn> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Fn>();
}

#define FUSED_RESNET_OP(function, name, Fn)                        \
  inline const c10::TypedOperatorHandle<Fn>& function() {          \
    static const auto handle = find_op<Fn>("fused_resnet::" name); \
    return handle;                                                 \
  }

FUSED_RESNET_OP(forward_op, "batch_norm_act_forward", ForwardFn)
FUSED_RESNET_OP(apply_op, "batch_norm_act_apply", ApplyFn)
FUSED_RESNET_OP(backward_op, "batch_norm_act_backward", BackwardFn)
FUSED_RESNET_OP(add_op, "batch_norm_act_add", AddFn)
FUSED_RESNET_OP(conv_norm_forward_op, "conv2d_norm_forward", ConvNormForwardFn)
FUSED_RESNET_OP(conv_norm_backward_op, "conv2d_norm_backward", ConvNormBackwardFn)
FUSED_RESNET_OP(conv_norm_backward_data_op, "conv2d_norm_backward_data", ConvNormBackwardDataFn)
FUSED_RESNET_OP(conv_norm_backward_weight_op, "conv2d_norm_backward_weight", ConvNormBackwardWeightFn)
FUSED_RESNET_OP(statistics_op, "batch_norm_statistics", StatisticsFn)
FUSED_RESNET_OP(input_gradient_op, "batch_norm_input_gradient", InputGradientFn)
FUSED_RESNET_OP(residual_block_op, "residual_block", ResidualBlockFn)
FUSED_RESNET_OP(update_op, "batch_norm_update_", UpdateFn)
FUSED_RESNET_OP(pool_forward_op, "batch_norm_act_max_pool_forward", PoolForwardFn)
FUSED_RESNET_OP(pool_backward_op, "batch_norm_act_max_pool_backward", PoolBackwardFn)
FUSED_RESNET_OP(conv2d_forward_op, "conv2d_forward", Conv2dFn)
FUSED_RESNET_OP(conv2d_backward_op, "conv2d_backward", Conv2dBackwardFn)
FUSED_RESNET_OP(batch_norm_act_op, "batch_norm_act", BatchNormActFn)
FUSED_RESNET_OP(dual_op, "batch_norm_act_dual", DualFn)
FUSED_RESNET_OP(batch_norm_act_conv_op, "batch_norm_act_conv", BatchNormActConvFn)
FUSED_RESNET_OP(max_pool_op, "batch_norm_act_max_pool", MaxPoolFn)
FUSED_RESNET_OP(add_act_op, "add_act", AddActFn)
FUSED_RESNET_OP(conv2d_op, "conv2d", Conv2dFn)

#undef FUSED_RESNET_OP

// conv.cpp: whether ATen convolves this low-precision dtype natively on this CPU.
bool native_convolution(at::ScalarType dtype);
// conv.cpp, where autocast's heavy header is: eager's prelu, alone among the activations, lowers its output under
// autocast. Any other `y` is handed back.
Tensor autocast_prelu(const Tensor& y, int64_t act);

}  // namespace fused_resnet::bindings
