#include "batch_norm/driver.cuh"

namespace fused_resnet::cuda {
FR_INSTANTIATE_BATCH_NORM(Float16)
}  // namespace fused_resnet::cuda
