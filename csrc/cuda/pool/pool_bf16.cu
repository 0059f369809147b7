#include "pool/driver.cuh"

namespace fused_resnet::cuda {
FR_INSTANTIATE_STEM(BFloat16)
}  // namespace fused_resnet::cuda
