#include "pool/driver.cuh"

namespace fused_resnet::cuda {
FR_INSTANTIATE_STEM(float)
}  // namespace fused_resnet::cuda
