// What this machine and this build can run, and what was chosen.
#pragma once

#include <cstddef>

#include "fused_resnet/types.h"

namespace fused_resnet {

enum class CpuIsa : uint8_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
inline constexpr int kCpuIsaCount = 5;

const char* isa_name(CpuIsa isa);                  // "scalar" "avx2" "avx512" "avx512_bf16" "amx"
bool parse_isa(const char* name, CpuIsa* result);  // false: unknown name

// One row of kernels.inc.
struct KernelInfo {
  const char* op;    // "batch_norm" or "pool"
  const char* pass;  // "stats" "apply" "backward_reduce" "backward_apply" ...
  DType dtype;
  CpuIsa isa;
  const char* name;  // "bn_apply_bf16_avx512"
};

namespace cpu {
CpuIsa detected_isa();   // the best this CPU and operating system run
CpuIsa current_isa();    // detected, lowered by the cap
bool pairs_are_slow();   // products of pairs of bfloat16 take longer than those of floats
const char* isa_note();  // why a level that the CPU has is not used; null: there is none
// Lowers or restores the level. A cap above what the machine has changes nothing.
Status set_isa_cap(CpuIsa cap);
const KernelInfo* kernel_table(size_t* count);
// The row that runs now: the highest level, at most current_isa(), that has one.
const KernelInfo* selected_kernel(const char* op, const char* pass, DType dtype);
int64_t last_level_cache_bytes();
int64_t second_level_cache_bytes();  // 0: unknown
}  // namespace cpu

// Only in builds with CUDA.
namespace cuda {

// Why kernels of this build cannot run on the current device: no driver, or no image for its architecture. The message
// says which architectures were built and how to rebuild; null when they can. Asked once for each device, unless the
// error may pass, such as one of memory: then `*may_pass` is true, and the next call asks again.
Status device_status(bool* may_pass = nullptr);

}  // namespace cuda

}  // namespace fused_resnet
