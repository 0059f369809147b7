// The groups of native tests, and what they share.
#pragma once

#include <string>
#include <vector>

#include "backend.h"
#include "check.h"
#include "fused_resnet/capability.h"
#include "tensors.h"

namespace fused_resnet::native_test {

void test_batch_norm(Report& report, const Backend& backend);
void test_pool(Report& report, const Backend& backend);
void test_special_values(Report& report, const Backend& backend);
void test_running_statistics(Report& report, const Backend& backend);

// The CPU's only.
void test_dispatch(Report& report);
void test_memory(Report& report);
void test_shares(Report& report);
void test_batch_norm_parts(Report& report);
void test_conv(Report& report, const std::vector<CpuIsa>& levels);
void test_split_floats(Report& report);
void test_conv_inference(Report& report, const std::vector<CpuIsa>& levels);
void test_window(Report& report, const std::vector<CpuIsa>& levels);

inline const char* activation_name(Activation act) {
  static constexpr const char* kNames[] = {"identity", "relu", "leaky_relu", "prelu", "sigmoid", "tanh", "silu"};
  return kNames[static_cast<int>(act)];
}

inline std::string shape_name(const Shape& shape) {
  return std::string(dtype_name(shape.dtype)) + (shape.layout == Layout::kNHWC ? " nhwc " : " nchw ") +
         std::to_string(shape.n) + "x" + std::to_string(shape.c) + "x" + std::to_string(shape.s);
}

}  // namespace fused_resnet::native_test
