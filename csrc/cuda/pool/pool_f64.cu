#include "pool/driver.cuh"

namespace fused_resnet::cuda {
FR_INSTANTIATE_STEM(double)
}  // namespace fused_resnet::cuda
