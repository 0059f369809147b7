// The groups of native tests, and what they share.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "fused_resnet/capability.h"
#include "tensors.h"

namespace fused_resnet::native_test {

void test_dispatch(Report& report);
void test_batch_norm(Report& report, CpuIsa isa);
void test_pool(Report& report, CpuIsa isa);
void test_special_values(Report& report, CpuIsa isa);
void test_running_statistics(Report& report);
void test_memory(Report& report);

inline const std::vector<DType>& dtypes_of(CpuIsa isa) {
  static const std::vector<DType> kAll = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  static const std::vector<DType> kBFloat16Only = {DType::kBFloat16};  // the other kernels are avx512's
  return isa == CpuIsa::kAvx512Bf16 ? kBFloat16Only : kAll;
}

inline const char* activation_name(Activation act) {
  static constexpr const char* kNames[] = {"identity", "relu", "leaky_relu", "prelu", "sigmoid", "tanh", "silu"};
  return kNames[static_cast<int>(act)];
}

inline std::string shape_name(const Shape& shape) {
  return std::string(dtype_name(shape.dtype)) + (shape.layout == Layout::kNHWC ? " nhwc " : " nchw ") +
         std::to_string(shape.n) + "x" + std::to_string(shape.c) + "x" + std::to_string(shape.s);
}

}  // namespace fused_resnet::native_test
