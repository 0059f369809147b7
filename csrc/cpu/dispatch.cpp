#include "dispatch.h"

#include <cstring>

namespace fused_resnet::cpu {

#define FR_BN_KERNEL(pass, dtype, isa, name) void name(const BnArgs&, int64_t, int64_t);
#define FR_POOL_KERNEL(pass, dtype, isa, name) void name(const PoolArgs&, int64_t, int64_t);
#define FR_CONV_KERNEL(pass, dtype, isa, name) void name(const ConvArgs&, int64_t, int64_t, void*);
#define FR_CONV_PACK_KERNEL(pass, dtype, isa, name) void name(const ConvPackArgs&, int64_t, int64_t);
#define FR_CONV_WEIGHT_KERNEL(pass, dtype, isa, name) void name(const WeightArgs&, int64_t, int64_t, void*);
#define FR_WINDOW_KERNEL(pass, dtype, isa, name) void name(const WindowArgs&, int64_t, int64_t);
#include "kernels.inc"

namespace {

// Spelled as in kernels.inc.
enum : uint8_t { f64, f32, bf16, f16 };
static_assert(f64 == static_cast<int>(DType::kFloat64) && f32 == static_cast<int>(DType::kFloat32));
static_assert(bf16 == static_cast<int>(DType::kBFloat16) && f16 == static_cast<int>(DType::kFloat16));
enum : uint8_t { scalar, avx2, avx512, avx512_bf16, amx };
static_assert(avx2 == static_cast<int>(CpuIsa::kAvx2) && amx == static_cast<int>(CpuIsa::kAmx));

template <class Pass, class Kernel>
struct Row {
  Pass pass;
  DType dtype;
  CpuIsa isa;
  Kernel kernel;
  const char* name;
};

constexpr Row<BnPass, BnKernel> kBnRows[] = {
#define FR_BN_KERNEL(pass, dtype, isa, name) \
  {BnPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name, #name},
#include "kernels.inc"
};

constexpr Row<PoolPass, PoolKernel> kPoolRows[] = {
#define FR_POOL_KERNEL(pass, dtype, isa, name) \
  {PoolPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name, #name},
#include "kernels.inc"
};

constexpr Row<ConvPass, ConvKernel> kConvRows[] = {
#define FR_CONV_KERNEL(pass, dtype, isa, name) \
  {ConvPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name, #name},
#include "kernels.inc"
};

constexpr Row<ConvPass, ConvPackKernel> kConvPackRows[] = {
#define FR_CONV_PACK_KERNEL(pass, dtype, isa, name) \
  {ConvPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name, #name},
#include "kernels.inc"
};

constexpr Row<ConvPass, WeightKernel> kWeightRows[] = {
#define FR_CONV_WEIGHT_KERNEL(pass, dtype, isa, name) \
  {ConvPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name, #name},
#include "kernels.inc"
};

constexpr Row<WindowPass, WindowKernel> kWindowRows[] = {
#define FR_WINDOW_KERNEL(pass, dtype, isa, name) \
  {WindowPass::pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), name, #name},
#include "kernels.inc"
};

constexpr KernelInfo kInfo[] = {
#define FR_INFO(op, pass, dtype, isa, name) {op, #pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), #name},
#define FR_BN_KERNEL(pass, dtype, isa, name) FR_INFO("batch_norm", pass, dtype, isa, name)
#define FR_POOL_KERNEL(pass, dtype, isa, name) FR_INFO("pool", pass, dtype, isa, name)
#define FR_CONV_KERNEL(pass, dtype, isa, name) FR_INFO("conv", pass, dtype, isa, name)
#define FR_CONV_PACK_KERNEL(pass, dtype, isa, name) FR_INFO("conv", pass, dtype, isa, name)
#define FR_CONV_WEIGHT_KERNEL(pass, dtype, isa, name) FR_INFO("conv", pass, dtype, isa, name)
#define FR_WINDOW_KERNEL(pass, dtype, isa, name) FR_INFO("window", pass, dtype, isa, name)
#include "kernels.inc"
#undef FR_INFO
};

// Rows of one pass and dtype stand in rising order of level; scalar rows are there for every dtype, but where a vector
// is shared by groups.
template <class Rows, class Pass>
const auto& pick_row(const Rows& rows, Pass pass, DType dtype, CpuIsa most = CpuIsa::kAmx) {
  const CpuIsa limit = current_isa() < most ? current_isa() : most;
  const auto* best = &rows[0];
  for (const auto& row : rows) {
    if (row.pass == pass && row.dtype == dtype && row.isa <= limit) best = &row;
  }
  return *best;
}
template <class Rows, class Pass>
auto pick(const Rows& rows, Pass pass, DType dtype) {
  return pick_row(rows, pass, dtype).kernel;
}

// The highest level for convolutions that tiles do not take.
CpuIsa without_tiles() { return pairs_are_slow() ? CpuIsa::kAvx512 : CpuIsa::kAvx512Bf16; }
CpuIsa highest(bool tiles) { return tiles && current_isa() == CpuIsa::kAmx ? CpuIsa::kAmx : without_tiles(); }

// As the kernels' files have it.
ConvTraits conv_traits(DType dtype, CpuIsa isa, int split = 0) {
  const bool wide = dtype == DType::kFloat64, tiles = isa == CpuIsa::kAmx;
  const bool pairs = isa == CpuIsa::kAvx512Bf16 || tiles;
  ConvTraits t;
  t.split = dtype == DType::kFloat32 && tiles ? split : 0;
  t.compute_size = wide ? 8 : t.split > 0 ? 2 * t.split : pairs ? 2 : 4;
  t.width = isa == CpuIsa::kScalar ? 1 : isa == CpuIsa::kAvx2 ? (wide ? 4 : 8) : 16;
  t.pair = tiles ? 32 : pairs ? 2 : 1;
  t.tile = isa == CpuIsa::kScalar ? 4 : isa == CpuIsa::kAvx2 ? 6 : tiles ? 32 : 14;
  t.native = t.split == 0 && (wide || dtype == DType::kFloat32 || pairs);
  return t;
}

const WeightTraits& weight_traits(DType dtype, CpuIsa isa) {
  const bool wide = dtype == DType::kFloat64;
  switch (isa) {
    case CpuIsa::kAvx2:
      return wide ? kWeightF64Avx2 : kWeightF32Avx2;
    case CpuIsa::kAvx512:
      return kWeightF32Avx512;
    case CpuIsa::kAvx512Bf16:
      return kWeightBf16Avx512Bf16;
    case CpuIsa::kAmx:
      return kWeightAmx;
    case CpuIsa::kScalar:
      break;
  }
  return wide ? kWeightF64Scalar : kWeightF32Scalar;
}

}  // namespace

BnKernel bn_kernel(BnPass pass, DType dtype) { return pick(kBnRows, pass, dtype); }
PoolKernel pool_kernel(PoolPass pass, DType dtype) { return pick(kPoolRows, pass, dtype); }
WindowKernel window_kernel(WindowPass pass, DType dtype) { return pick(kWindowRows, pass, dtype); }

ConvKernels conv_kernels(DType dtype, bool tiles, int split) {
  const bool whole = dtype == DType::kFloat32 && split == 0;
  const CpuIsa most = highest(tiles && !whole);
  const auto& row = pick_row(kConvRows, ConvPass::convolve, dtype, most);
  const auto& pack = pick_row(kConvPackRows, ConvPass::pack, dtype, most);
  return {row.kernel, pack.kernel, conv_traits(dtype, row.isa, split), row.name, pack.name};
}

ConvKernels grouped_kernels(DType dtype) {
  const auto& row = pick_row(kConvRows, ConvPass::grouped, dtype, without_tiles());
  if (row.pass != ConvPass::grouped) return {};
  const auto& pack = pick_row(kConvPackRows, ConvPass::grouped_pack, dtype, without_tiles());
  ConvTraits traits = conv_traits(dtype, row.isa);
  if (row.isa == CpuIsa::kAvx2) traits.tile = 10;
  traits.grouped = true;
  return {row.kernel, pack.kernel, traits, row.name, pack.name};
}

ConvKernels winograd_kernels(DType dtype) {
  const auto& row = pick_row(kConvRows, ConvPass::winograd, dtype);
  const auto& pack = pick_row(kConvPackRows, ConvPass::winograd_pack, dtype);
  return {row.kernel, pack.kernel, conv_traits(DType::kFloat32, row.isa), row.name, pack.name};
}

WeightKernelInfo conv_weight_kernel(DType dtype, int64_t groups) {
  // Groups are mostly of few channels: tiles would be half empty.
  const CpuIsa most = highest(groups == 1 && dtype != DType::kFloat32);
  const auto& row = pick_row(kWeightRows, ConvPass::weight_gradient, dtype, most);
  return {row.kernel, weight_traits(dtype, row.isa), row.name};
}

WeightKernelInfo split_weight_kernel(int split) {
  if (split == 0 || current_isa() < CpuIsa::kAmx) return {};
  const auto& row = pick_row(kWeightRows, ConvPass::weight_gradient, DType::kFloat32);
  WeightTraits traits = weight_traits(DType::kFloat32, row.isa);
  traits.split = split;
  return {row.kernel, traits, row.name};
}

WeightKernelInfo grouped_weight_kernel(DType dtype) {
  const auto& row = pick_row(kWeightRows, ConvPass::grouped_weight, dtype);
  if (row.pass != ConvPass::grouped_weight) return {};
  const ConvTraits traits = conv_traits(DType::kFloat32, row.isa);
  return {row.kernel, {traits.compute_size, 1, traits.width, 0, 1}, row.name};
}

WeightKernelInfo winograd_weight_kernel(DType dtype) {
  const auto& row = pick_row(kWeightRows, ConvPass::winograd_weight, dtype);
  const ConvTraits traits = conv_traits(DType::kFloat32, row.isa);
  return {row.kernel, {traits.compute_size, 1, traits.width, traits.tile, 2}, row.name};
}

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
