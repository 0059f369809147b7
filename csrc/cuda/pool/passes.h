// What the files of one dtype (pool_<dtype>.cu) offer to the operators. T is the storage type.
#pragma once

#include "fused_resnet/pool.h"

namespace fused_resnet::cuda {

template <class T>
Status stem_forward(const BatchNormActMaxPoolForward& p);
template <class T>
Status stem_backward(const BatchNormActMaxPoolBackward& p);

}  // namespace fused_resnet::cuda
