// The groups of native tests, and what they share.
#pragma once

#include <algorithm>
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

// Dtypes for which the table has kernels of this very level: the others fall to a lower one.
inline std::vector<DType> dtypes_of(CpuIsa isa) {
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);
  std::vector<DType> dtypes;
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const auto is_ours = [&](const KernelInfo& row) { return row.isa == isa && row.dtype == dtype; };
    if (std::any_of(table, table + count, is_ours)) dtypes.push_back(dtype);
  }
  return dtypes;
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
