// 16-bit floats outside the kernels: one definition of the conversions (storage.h),
// here for code built for any CPU.
#pragma once

#include <cstdint>

#include "fused_resnet/types.h"

namespace fused_resnet::cpu {

// Element i of an array of `dtype`, in double and back.
double load_element(const void* array, DType dtype, int64_t i);
void store_element(void* array, DType dtype, int64_t i, double value);

}  // namespace fused_resnet::cpu
