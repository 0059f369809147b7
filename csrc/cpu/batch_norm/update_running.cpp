// Running statistics: running <- (1 - momentum) * running + momentum * batch.
#include <cmath>

#include "fused_resnet/batch_norm.h"
#include "host_float.h"

namespace fused_resnet::cpu {
Status batch_norm_update_running(const BatchNormUpdateRunning& p) {
  if (p.count < 2) return {"batch_norm_update_running: the unbiased variance needs more than one value per channel"};
  const DType stat = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const double n = static_cast<double>(p.count), unbias = n / (n - 1);
  const auto blend = [&](void* running, const void* batch, double factor) {
    if (running == nullptr) return;
    for (int64_t i = 0; i < p.c; ++i) {
      const double old = load_element(running, p.running_dtype, i), now = load_element(batch, stat, i) * factor;
      store_element(running, p.running_dtype, i, (1 - p.momentum) * old + p.momentum * now);
    }
  };
  blend(p.running_mean, p.mean, 1);
  blend(p.running_var, p.var, unbias);
  return {};
}

Status batch_norm_fixed_stats(const BatchNormFixedStats& p) {
  const DType stat = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (int64_t i = 0; i < p.c; ++i) {
    store_element(p.mean, stat, i, load_element(p.running_mean, stat, i));
    store_element(p.rstd, stat, i, 1 / std::sqrt(load_element(p.running_var, stat, i) + p.eps));
  }
  return {};
}

}  // namespace fused_resnet::cpu
