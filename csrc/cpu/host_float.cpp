#include "host_float.h"

namespace fused_resnet::cpu {
namespace {
#include "simd/storage.h"
}  // namespace

double load_element(const void* array, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(array)[i];
    case DType::kFloat32:
      return static_cast<double>(static_cast<const float*>(array)[i]);
    case DType::kBFloat16:
      return static_cast<double>(to_float(static_cast<const BFloat16*>(array)[i]));
    case DType::kFloat16:
      return static_cast<double>(to_float(static_cast<const Float16*>(array)[i]));
  }
  return 0;
}

void store_element(void* array, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(array)[i] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(array)[i] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(array)[i] = to_bfloat16(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<Float16*>(array)[i] = to_float16(static_cast<float>(value));
      break;
  }
}

}  // namespace fused_resnet::cpu
