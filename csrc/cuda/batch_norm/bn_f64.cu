#include "batch_norm/driver.cuh"

namespace fused_resnet::cuda {
FR_INSTANTIATE_BATCH_NORM(double)
}  // namespace fused_resnet::cuda
