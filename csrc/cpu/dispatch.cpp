#include "dispatch.h"

#include <cstring>

namespace fused_resnet::cpu {

#define FR_BN_KERNEL(pass, dtype, isa, name) void name(const BnArgs&, int64_t, int64_t);
#define FR_POOL_KERNEL(pass, dtype, isa, name) void name(const PoolArgs&, int64_t, int64_t);
#include "kernels.inc"
#undef FR_BN_KERNEL
#undef FR_POOL_KERNEL

namespace {

// Spelled as in kernels.inc.
enum : uint8_t { f64, f32, bf16, f16 };
static_assert(f64 == static_cast<int>(DType::kFloat64) && f32 == static_cast<int>(DType::kFloat32));
static_assert(bf16 == static_cast<int>(DType::kBFloat16) && f16 == static_cast<int>(DType::kFloat16));
enum : uint8_t { scalar, avx2, avx512, avx512_bf16 };
static_assert(avx2 == static_cast<int>(CpuIsa::kAvx2) && avx512_bf16 == static_cast<int>(CpuIsa::kAvx512Bf16));

template <class Pass, class Kernel>
struct Row {
  Pass pass;
  DType dtype;
  CpuIsa isa;
  Kernel kernel;
};

constexpr Row<BnPass, BnKernel> kBnRows[] = {
#define FR_BN_KERNEL(pass, dtype, isa, name) {BnPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name},
#define FR_POOL_KERNEL(pass, dtype, isa, name)
#include "kernels.inc"
#undef FR_BN_KERNEL
#undef FR_POOL_KERNEL
};

constexpr Row<PoolPass, PoolKernel> kPoolRows[] = {
#define FR_BN_KERNEL(pass, dtype, isa, name)
#define FR_POOL_KERNEL(pass, dtype, isa, name) \
  {PoolPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name},
#include "kernels.inc"
#undef FR_BN_KERNEL
#undef FR_POOL_KERNEL
};

constexpr KernelInfo kInfo[] = {
#define FR_BN_KERNEL(pass, dtype, isa, name) \
  {"batch_norm", #pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), #name},
#define FR_POOL_KERNEL(pass, dtype, isa, name) \
  {"pool", #pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), #name},
#include "kernels.inc"
#undef FR_BN_KERNEL
#undef FR_POOL_KERNEL
};

// Rows of one pass and dtype stand in rising order of level.
template <class Rows, class Pass>
auto pick(const Rows& rows, Pass pass, DType dtype) {
  const CpuIsa limit = current_isa();
  decltype(rows[0].kernel) best = nullptr;
  for (const auto& row : rows) {
    if (row.pass == pass && row.dtype == dtype && row.isa <= limit) best = row.kernel;
  }
  return best;
}

}  // namespace

BnKernel bn_kernel(BnPass pass, DType dtype) { return pick(kBnRows, pass, dtype); }
PoolKernel pool_kernel(PoolPass pass, DType dtype) { return pick(kPoolRows, pass, dtype); }

const KernelInfo* kernel_table(size_t* count) {
  *count = sizeof(kInfo) / sizeof(kInfo[0]);
  return kInfo;
}

const KernelInfo* selected_kernel(const char* op, const char* pass, DType dtype) {
  const KernelInfo* best = nullptr;
  for (const KernelInfo& info : kInfo) {
    if (std::strcmp(info.op, op) == 0 && std::strcmp(info.pass, pass) == 0 && info.dtype == dtype &&
        info.isa <= current_isa()) {
      best = &info;
    }
  }
  return best;
}

bool stream_stores(int64_t bytes_touched, int64_t row_bytes, const void* out0, const void* out1) {
  constexpr uintptr_t kLine = 64;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(out0) | reinterpret_cast<uintptr_t>(out1);
  return bytes_touched > last_level_cache_bytes() && row_bytes % static_cast<int64_t>(kLine) == 0 &&
         addresses % kLine == 0;
}

}  // namespace fused_resnet::cpu
