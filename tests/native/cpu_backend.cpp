#include "cpu_backend.h"

#include <algorithm>
#include <cstring>

#include "runners.h"

namespace fused_resnet::native_test {
namespace {

// Dtypes for which the table has kernels of this very level: the others fall to a lower one. Convolutions are apart.
std::vector<DType> dtypes_of(CpuIsa isa) {
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);
  std::vector<DType> dtypes;
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const auto is_ours = [&](const KernelInfo& row) {
      return row.isa == isa && row.dtype == dtype && std::strcmp(row.op, "conv") != 0;
    };
    if (std::any_of(table, table + count, is_ours)) dtypes.push_back(dtype);
  }
  return dtypes;
}

// Threads cost time: for tensors of several chunks, and now and then.
std::vector<Way> other_ways(int variant, int64_t numel) {
  std::vector<Way> ways = {{shuffled_runner()}};
  if (variant % 16 == 0 || numel > 20000) ways.push_back({threaded_runner()});
  return ways;
}

}  // namespace

Backend cpu_backend(CpuIsa isa) {
  Backend backend;
  backend.name = isa_name(isa);
  backend.dtypes = dtypes_of(isa);
  backend.forward_workspace = cpu::batch_norm_act_forward_workspace;
  backend.backward_workspace = cpu::batch_norm_act_backward_workspace;
  backend.forward = cpu::batch_norm_act_forward;
  backend.backward = cpu::batch_norm_act_backward;
  backend.update_running = cpu::batch_norm_update_running;
  backend.fixed_stats = cpu::batch_norm_fixed_stats;
  backend.pool_workspace = cpu::batch_norm_act_max_pool_workspace;
  backend.pool_forward = cpu::batch_norm_act_max_pool_forward;
  backend.pool_backward = cpu::batch_norm_act_max_pool_backward;
  backend.other_ways = other_ways;
  return backend;
}

}  // namespace fused_resnet::native_test
