// Autocast as eager's operators do it: operands cast once, then the operator again
// with autocast excluded.
#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "bindings/ops.h"

namespace fused_resnet::bindings {

template <at::DeviceType kDevice>
class Autocast {
 public:
  at::ScalarType dtype() const { return dtype_; }
  Tensor cast(const Tensor& t) const { return at::autocast::cached_cast(dtype_, t, kDevice); }
  OptionalTensor cast(const OptionalTensor& t) const { return at::autocast::cached_cast(dtype_, t, kDevice); }

 private:
  c10::impl::ExcludeDispatchKeyGuard excluded_{at::autocast::get_autocast_dispatch_key_from_device_type(kDevice)};
  at::ScalarType dtype_ = at::autocast::get_autocast_dtype(kDevice);
};

}  // namespace fused_resnet::bindings
