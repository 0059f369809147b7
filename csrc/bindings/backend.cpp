#include "bindings/backend.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <stdexcept>
#include <string>

#include "bindings/schemas.h"
#include "bindings/verbose.h"
#include "fused_resnet/capability.h"

namespace fused_resnet::bindings {
namespace {

constexpr Backend kCpu{
    .forward_workspace = cpu::batch_norm_act_forward_workspace,
    .backward_workspace = cpu::batch_norm_act_backward_workspace,
    .max_pool_workspace = cpu::batch_norm_act_max_pool_workspace,
    .forward = cpu::batch_norm_act_forward,
    .backward = cpu::batch_norm_act_backward,
    .update_running = cpu::batch_norm_update_running,
    .fixed_stats = cpu::batch_norm_fixed_stats,
    .max_pool_forward = cpu::batch_norm_act_max_pool_forward,
    .max_pool_backward = cpu::batch_norm_act_max_pool_backward,
};

#ifdef FUSED_RESNET_WITH_CUDA

constexpr Backend kCuda{
    .forward_workspace = cuda::batch_norm_act_forward_workspace,
    .backward_workspace = cuda::batch_norm_act_backward_workspace,
    .max_pool_workspace = cuda::batch_norm_act_max_pool_workspace,
    .forward = cuda::batch_norm_act_forward,
    .backward = cuda::batch_norm_act_backward,
    .update_running = cuda::batch_norm_update_running,
    .fixed_stats = cuda::batch_norm_fixed_stats,
    .max_pool_forward = cuda::batch_norm_act_max_pool_forward,
    .max_pool_backward = cuda::batch_norm_act_max_pool_backward,
};

#else

constexpr const char* kCpuOnly =
    "this build of fused_resnet has kernels for the CPU only, none for CUDA; to get them, reinstall it in its source "
    "tree with FUSED_RESNET_CUDA=1 and nvcc on PATH or CUDA_HOME set";

// Stands in for each device operator: a plain "not implemented" would not say how to get it.
void not_built(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.operator_name().name, ": ", kCpuOnly);
}

#endif

const Backend* backend_of(const char* op, const at::Tensor& x) {
  if (x.is_cpu()) return &kCpu;
#ifdef FUSED_RESNET_WITH_CUDA
  if (x.is_cuda()) return &kCuda;
#endif
  TORCH_CHECK(false, op, ": expected x on a device that has kernels, got ", x.device());
}

// PyTorch's threads, each index its own task; on this thread alone inside another parallel region.
Runner make_runner() {
  Runner runner;
  runner.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (runner.threads > 1) {
    runner.for_each = [](int64_t count, Runner::Task task, void* arg) {
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { task(arg, begin, end); });
    };
  }
  return runner;
}

void register_all(torch::Library& m) {
  register_batch_norm(m);
  register_conv(m);
  register_pool(m);
}

}  // namespace

Execution::Execution(const char* op, const at::Tensor& x) : op_(op), backend_(backend_of(op, x)) {
  if (backend_ == &kCpu) {
    runner_ = make_runner();
    return;
  }
#ifdef FUSED_RESNET_WITH_CUDA
  const c10::Device device = x.device();
  device_.reset_device(device);
  check::status(op_, cuda::device_status());
  stream_ = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
#endif
}

void Execution::say(const Shape& shape, const char* family, std::initializer_list<const char*> passes) const {
  if (verbose) [[unlikely]] {
    bindings::say(op_, shape, family, passes, /*cuda=*/backend_ != &kCpu);
  }
}

std::optional<std::string> why_no_cuda([[maybe_unused]] int64_t index) {
#ifdef FUSED_RESNET_WITH_CUDA
  if (!c10::impl::hasDeviceGuardImpl(c10::kCUDA)) return "this PyTorch has no CUDA";
  const c10::DeviceGuard device(c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index)));
  bool may_pass = false;
  const Status status = cuda::device_status(&may_pass);
  if (may_pass) throw std::runtime_error(status.message);  // no answer to remember
  return status.ok() ? std::nullopt : std::optional<std::string>(status.message);
#else
  return kCpuOnly;
#endif
}

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) { register_all(m); }

TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
#ifdef FUSED_RESNET_WITH_CUDA
  register_all(m);
#else
  for (const char* schema : kDeviceSchemas) {
    m.impl(bare_name(schema).c_str(), torch::CppFunction::makeFromBoxedFunction<&not_built>());
  }
  m.impl(bare_name(kUpdateSchema).c_str(), torch::CppFunction::makeFromBoxedFunction<&not_built>());
#endif
}

}  // namespace fused_resnet::bindings
