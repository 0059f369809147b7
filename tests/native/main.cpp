// Runs every kernel of every instruction set this machine (or the emulation) has,
// or of the one named: native_test [scalar|avx2|avx512|avx512_bf16|amx].
#include <cstring>

#include "compare.h"
#include "cpu_backend.h"
#include "tests.h"

int main(int argc, char** argv) {
  using namespace fused_resnet;
  using namespace fused_resnet::native_test;
  Report report;
  test_dispatch(report);
  test_running_statistics(report, cpu_backend(cpu::current_isa()));
  test_memory(report);
  test_shares(report);
  std::vector<CpuIsa> levels;
  for (int level = 0; level < kCpuIsaCount; ++level) {
    const auto isa = static_cast<CpuIsa>(level);
    if (argc > 1 && std::strcmp(argv[1], isa_name(isa)) != 0) continue;
    if (isa > cpu::detected_isa()) {
      report.skip(isa_name(isa), "this processor does not have it");
      continue;
    }
    report.begin(std::string("capped at ") + isa_name(isa));
    const Status status = cpu::set_isa_cap(isa);
    if (!status.ok() || cpu::current_isa() != isa) report.fail("%s", status.ok() ? "cap ignored" : status.message);
    levels.push_back(isa);
    const Backend backend = cpu_backend(isa);
    test_batch_norm(report, backend);
    test_batch_norm_parts(report);
    test_pool(report, backend);
    test_special_values(report, backend);
  }
  test_split_floats(report);
  test_conv(report, levels);
  test_conv_inference(report, levels);
  test_window(report, levels);
  std::printf("largest error: %.2f of its bound\n", largest_part_of_bound());
  return report.finish();
}
