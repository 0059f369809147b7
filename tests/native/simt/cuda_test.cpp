// The CUDA backend's own kernel files, run by the emulation: every pass against the reference, at several schedules.
//   cuda_test [f64|f32|bf16|f16 [small]]      small: with few blocks, whose threads walk several rounds (rounds.h)
#include <cstring>

#include "../compare.h"
#include "../tests.h"
#include "rounds.h"
#include "simt.h"

namespace fused_resnet::native_test {
namespace {

// Beside the ascending order: one random order of threads and blocks, and now and then another.
std::vector<Way> other_schedules(int variant, int64_t numel) {
  const auto seed = static_cast<uint64_t>(variant) * 2 + 1;
  std::vector<Way> ways = {{{}, seed}};
  if (variant % 4 == 0 || (numel > 20000 && numel < 1000000)) ways.push_back({{}, seed + 1});
  return ways;
}

void begin(uint64_t seed) {
  simt::clear_failure();
  simt::set_schedule(seed);
}

Backend cuda_backend() {
  Backend backend;
  backend.name = "cuda";
  backend.dtypes = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  backend.forward_workspace = cuda::batch_norm_act_forward_workspace;
  backend.backward_workspace = cuda::batch_norm_act_backward_workspace;
  backend.forward = cuda::batch_norm_act_forward;
  backend.backward = cuda::batch_norm_act_backward;
  backend.update_running = cuda::batch_norm_update_running;
  backend.fixed_stats = cuda::batch_norm_fixed_stats;
  backend.pool_workspace = cuda::batch_norm_act_max_pool_workspace;
  backend.pool_forward = cuda::batch_norm_act_max_pool_forward;
  backend.pool_backward = cuda::batch_norm_act_max_pool_backward;
  backend.relu_of_negative_zero = 0.0;
  backend.outlier_error = 1e-6;
  backend.many_rows = 1100000;
  backend.other_ways = other_schedules;
  backend.begin = begin;
  backend.failure = simt::failure;
  return backend;
}

}  // namespace
}  // namespace fused_resnet::native_test

int main(int argc, char** argv) {
  using namespace fused_resnet::native_test;
  Report report;
  Backend backend = cuda_backend();
  const bool small = argc > 2 && std::strcmp(argv[2], "small") == 0;
  if (small) {
    use_few_blocks(backend);
  } else {
    test_running_statistics(report, backend);
  }
  if (argc > 1) std::erase_if(backend.dtypes, [&](auto dtype) { return std::strcmp(dtype_name(dtype), argv[1]) != 0; });
  test_batch_norm(report, backend);
  test_pool(report, backend);
  test_special_values(report, backend);
  if (small) check_rounds(report, backend);
  std::printf("largest error: %.2f of its bound; %lld blocks\n", largest_part_of_bound(),
              static_cast<long long>(fused_resnet::simt::blocks_run()));
  return report.finish();
}
