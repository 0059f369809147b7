// Running statistics: running <- (1 - momentum) * running + momentum * batch; and the copies that a forward with fixed
// statistics uses. One thread per channel, in double: a few kilobytes in all.
#include "batch_norm/passes.h"

namespace fused_resnet::cuda {
namespace {

FR_DEVICE double load_element(const void* array, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(array)[i];
    case DType::kBFloat16:
      return static_cast<double>(to_stat(static_cast<const BFloat16*>(array)[i]));
    case DType::kFloat16:
      return static_cast<double>(to_stat(static_cast<const Float16*>(array)[i]));
    default:
      return static_cast<double>(static_cast<const float*>(array)[i]);
  }
}

FR_DEVICE void store_element(void* array, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(array)[i] = value;
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(array)[i] = from_stat<BFloat16>(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<Float16*>(array)[i] = from_stat<Float16>(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(array)[i] = static_cast<float>(value);
      break;
  }
}

DType stat_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

FR_DEVICE int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

struct UpdateArgs {
  int64_t channels;
  DType stat, running;
  const void *mean, *var;
  double momentum, unbias;
  void *running_mean, *running_var;  // nullable
};

__global__ void __launch_bounds__(kThreads) update_running_kernel(UpdateArgs a) {
  const int64_t c = thread_index();
  if (c >= a.channels) return;
  if (a.running_mean != nullptr) {
    const double old = load_element(a.running_mean, a.running, c), now = load_element(a.mean, a.stat, c);
    store_element(a.running_mean, a.running, c, (1 - a.momentum) * old + a.momentum * now);
  }
  if (a.running_var != nullptr) {
    const double old = load_element(a.running_var, a.running, c), now = load_element(a.var, a.stat, c) * a.unbias;
    store_element(a.running_var, a.running, c, (1 - a.momentum) * old + a.momentum * now);
  }
}

struct FixedArgs {
  int64_t channels;
  DType stat;
  double eps;
  const void *running_mean, *running_var;
  void *mean, *rstd;
};

__global__ void __launch_bounds__(kThreads) fixed_stats_kernel(FixedArgs a) {
  const int64_t c = thread_index();
  if (c >= a.channels) return;
  store_element(a.mean, a.stat, c, load_element(a.running_mean, a.stat, c));
  store_element(a.rstd, a.stat, c, 1 / sqrt(load_element(a.running_var, a.stat, c) + a.eps));
}

}  // namespace

Status batch_norm_update_running(const BatchNormUpdateRunning& p) {
  if (p.count < 2) return {"batch_norm_update_running: the unbiased variance needs more than one value per channel"};
  if (p.c == 0) return {};
  const double n = static_cast<double>(p.count);
  const UpdateArgs args{p.c,        stat_dtype(p.dtype), p.running_dtype, p.mean,       p.var,
                        p.momentum, n / (n - 1),         p.running_mean,  p.running_var};
  return launch("batch_norm_update_running: CUDA refused to start a kernel", &update_running_kernel,
                divide_up(p.c, kThreads), kThreads, 0, p.stream, args);
}

Status batch_norm_fixed_stats(const BatchNormFixedStats& p) {
  if (p.c == 0) return {};
  const FixedArgs args{p.c, stat_dtype(p.dtype), p.eps, p.running_mean, p.running_var, p.mean, p.rstd};
  return launch("batch_norm_fixed_stats: CUDA refused to start a kernel", &fixed_stats_kernel, divide_up(p.c, kThreads),
                kThreads, 0, p.stream, args);
}

}  // namespace fused_resnet::cuda
