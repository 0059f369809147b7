// The registered operators, as in docs/architecture.md. Every name and default
// is part of the contract with fused_resnet/ops.
#pragma once

#include <string>

namespace fused_resnet::bindings {

// Device operators: kernels for CPU and CUDA, fake implementations in ops/_fake.py.
inline constexpr const char* kDeviceSchemas[] = {
    "batch_norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_running_mean, "
    "Tensor? residual_running_var, Tensor? act_weight, bool training, bool residual_norm, bool residual_training, "
    "float eps, float residual_eps, int act, float negative_slope, bool save_mask) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor var, Tensor residual_mean, Tensor residual_rstd, "
    "Tensor residual_var, Tensor mask)",

    "batch_norm_act_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? act_weight, "
    "int act, float negative_slope) -> Tensor",

    "batch_norm_act_add(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor residual, "
    "Tensor? residual_mean, Tensor? residual_rstd, Tensor? residual_weight, Tensor? residual_bias, int act, "
    "float negative_slope, bool save_mask) -> (Tensor y, Tensor mask)",

    "batch_norm_act_backward(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? residual_mean, Tensor? residual_rstd, Tensor? residual_weight, Tensor? residual_bias, "
    "Tensor? act_weight, Tensor? mask, bool training, bool residual_training, int act, float negative_slope, "
    "bool[7] output_mask) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual, Tensor grad_residual_weight, "
    "Tensor grad_residual_bias, Tensor grad_act_weight)",

    "batch_norm_act_max_pool_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? act_weight, bool training, float eps, int act, float negative_slope, "
    "bool save_argmax) -> (Tensor y, Tensor mean, Tensor rstd, Tensor var, Tensor argmax)",

    "batch_norm_act_max_pool_backward(Tensor grad_output, Tensor x, Tensor argmax, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, Tensor? act_weight, bool training, int act, float negative_slope, "
    "bool[4] output_mask) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_act_weight)",

    "conv2d_forward(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups) -> Tensor",

    "conv2d_backward(Tensor grad_output, Tensor x, Tensor weight, bool has_bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
};

// Device operators that only the CPU has.
inline constexpr const char* kCpuSchemas[] = {
    "conv2d_norm_forward(Tensor x, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? bias, int act, "
    "float negative_slope, Tensor conv_weight, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, Tensor? running_mean, Tensor? running_var, bool training, float eps, Tensor? conv_bias=None, "
    "Tensor? skip=None, bool statistics=True) "
    "-> (Tensor z, Tensor z_mean, Tensor z_rstd, Tensor z_var)",

    "conv2d_norm_backward_data(Tensor grad_output, Tensor? mask, Tensor? z, Tensor? z_mean, Tensor? z_rstd, "
    "Tensor? z_weight, Tensor? grad_z_weight, Tensor? grad_z_bias, bool training, Tensor conv_weight, Tensor x, "
    "Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? bias, int act, float negative_slope, Tensor? skip, "
    "Tensor? skip_mask, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",

    "conv2d_norm_backward_weight(Tensor grad_output, Tensor? mask, Tensor? z, Tensor? z_mean, Tensor? z_rstd, "
    "Tensor? z_weight, Tensor? grad_z_weight, Tensor? grad_z_bias, bool training, Tensor conv_weight, Tensor x, "
    "Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? bias, int act, float negative_slope, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool has_conv_bias=False) "
    "-> (Tensor grad_conv_weight, Tensor grad_conv_bias)",

    "conv2d_norm_backward(Tensor grad_output, Tensor? mask, Tensor? z, Tensor? z_mean, Tensor? z_rstd, "
    "Tensor? z_weight, Tensor? grad_z_weight, Tensor? grad_z_bias, bool training, Tensor conv_weight, Tensor x, "
    "Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? bias, int act, float negative_slope, Tensor? skip, "
    "Tensor? skip_mask, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "bool has_conv_bias=False) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_conv_weight, Tensor grad_conv_bias)",

    "batch_norm_statistics(Tensor x, Tensor? running_mean, Tensor? running_var, bool training, float eps) "
    "-> (Tensor mean, Tensor rstd, Tensor var)",

    "batch_norm_input_gradient(Tensor grad_output, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor grad_weight, Tensor grad_bias, bool training, Tensor? skip) -> Tensor grad_x",
};

// A device operator too, but statistics take no part in differentiation.
inline constexpr const char* kUpdateSchema =
    "batch_norm_update_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, SymInt count, "
    "float momentum) -> ()";

// Differentiable operators: autograd functions over the device operators.
inline constexpr const char* kDifferentiableSchemas[] = {
    "batch_norm_act(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? act_weight, bool training, float momentum, float eps, int act, "
    "float negative_slope) -> Tensor",

    "batch_norm_act_dual(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "Tensor residual, Tensor(c!)? residual_running_mean, Tensor(d!)? residual_running_var, Tensor? residual_weight, "
    "Tensor? residual_bias, Tensor? act_weight, bool training, float momentum, float eps, bool residual_training, "
    "float residual_momentum, float residual_eps, int act, float negative_slope) -> Tensor",

    "batch_norm_act_conv(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "Tensor? act_weight, bool training, float momentum, float eps, int act, float negative_slope, "
    "Tensor conv_weight, Tensor? conv_bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups) -> Tensor",

    "batch_norm_act_max_pool(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
    "Tensor? bias, Tensor? act_weight, bool training, float momentum, float eps, int act, float negative_slope) "
    "-> Tensor",

    "add_act(Tensor x, Tensor residual, Tensor? act_weight, int act, float negative_slope) -> Tensor",

    "conv2d(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups) -> Tensor",

    "residual_block(Tensor x, Tensor[] conv_weights, Tensor?[] weights, Tensor?[] biases, Tensor?[] running_means, "
    "Tensor?[] running_vars, bool[] training, float[] eps, SymInt[] geometry, bool downsample, bool recompute, "
    "bool preact=False) "
    "-> Tensor[]",
};

inline std::string bare_name(const char* schema) {
  const std::string text(schema);
  return text.substr(0, text.find('('));
}

}  // namespace fused_resnet::bindings
