// The kernel table is complete and in the order that dispatch relies on.
#include "dispatch.h"

#include <cstring>
#include <map>
#include <set>

#include "conv/geometry.h"
#include "fused_resnet/capability.h"
#include "tests.h"

namespace fused_resnet::cpu {
#define FR_CONV_KERNEL(pass, dtype, isa, name) void name(const ConvArgs&, int64_t, int64_t, void*);
#define FR_CONV_PACK_KERNEL(pass, dtype, isa, name) void name(const ConvPackArgs&, int64_t, int64_t);
#define FR_CONV_WEIGHT_KERNEL(pass, dtype, isa, name) void name(const WeightArgs&, int64_t, int64_t, void*);
#include "kernels.inc"
}  // namespace fused_resnet::cpu

namespace fused_resnet::native_test {

namespace {

struct ConvRow {
  const char* pass;
  DType dtype;
  CpuIsa isa;
  cpu::ConvKernel convolve;
  cpu::ConvPackKernel pack;
  cpu::WeightKernel weight_gradient;
};
// Spelled as in kernels.inc.
enum : uint8_t { f64, f32, bf16, f16 };
enum : uint8_t { scalar, avx2, avx512, avx512_bf16, amx };
const ConvRow kConvRows[] = {
#define FR_CONV_KERNEL(pass, dtype, isa, name) \
  {#pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), cpu::name, nullptr, nullptr},
#define FR_CONV_PACK_KERNEL(pass, dtype, isa, name) \
  {#pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), nullptr, cpu::name, nullptr},
#define FR_CONV_WEIGHT_KERNEL(pass, dtype, isa, name) \
  {#pass, static_cast<DType>(dtype), static_cast<CpuIsa>(isa), nullptr, nullptr, cpu::name},
#include "kernels.inc"
};

// The last row of a pass and dtype whose level is at most `most`.
const ConvRow& conv_row(const char* pass, DType dtype, CpuIsa most) {
  const ConvRow* best = nullptr;
  for (const ConvRow& row : kConvRows) {
    if (std::strcmp(row.pass, pass) == 0 && row.dtype == dtype && row.isa <= most) best = &row;
  }
  return *best;
}

// Where floats may be split, the shape says whether they are.
void check_split_choice(Report& report) {
  report.begin("floats are split where that pays");
  const ConvShape wide{16, 14, 14, 256, 1024}, narrow{16, 56, 56, 64, 256}, few{16, 7, 7, 512, 2048};
  const ConvShape taps{16, 14, 14, 256, 256, 3, 3, 2, 2, 1, 1};
  const ConvNumerics six{true, 3, true}, three{true, 2, true}, always{true, 3, false}, never{true, 0, true};
  struct Expected {
    const ConvShape& shape;
    const ConvNumerics& numerics;
    int conv, weight;
  };
  for (const Expected& e : {Expected{wide, six, 3, 3},
                            {narrow, six, 0, 0},
                            {few, six, 0, 3},
                            {taps, six, 0, 0},
                            {wide, three, 2, 2},
                            {narrow, three, 2, 0},
                            {few, three, 2, 2},
                            {narrow, always, 3, 3},
                            {wide, never, 0, 0}}) {
    const int conv = cpu::conv_split(e.shape, e.numerics), weight = cpu::weight_split(e.shape, e.numerics);
    if (conv != e.conv || weight != e.weight) {
      report.fail("%d -> %d channels: %d parts, weight gradient %d", static_cast<int>(e.shape.c),
                  static_cast<int>(e.shape.k), conv, weight);
    }
  }
}

void check_conv_levels(Report& report) {
  struct Operand {
    bool tiles;
    int split;  // what floats may be split into
  };
  constexpr Operand kOperands[] = {{false, 3}, {false, 0}, {true, 3}, {true, 2}, {true, 0}};
  for (int level = 0; level <= static_cast<int>(cpu::detected_isa()); ++level) {
    const auto cap = static_cast<CpuIsa>(level);
    report.begin(std::string("convolutions capped at ") + isa_name(cap) + " run the kernels of kernels.inc");
    cpu::set_isa_cap(cap);
    // Processors with tiles are Intel's, whose products of pairs are slow.
    if (cap == CpuIsa::kAmx && !cpu::pairs_are_slow()) report.fail("pairs are not slow");
    const CpuIsa without_tiles = cpu::pairs_are_slow() ? CpuIsa::kAvx512 : cap;
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const Operand& o : kOperands) {
        const bool whole = dtype == DType::kFloat32 && o.split == 0;
        const CpuIsa most = o.tiles && !whole && cap == CpuIsa::kAmx ? cap : without_tiles;
        const cpu::ConvKernels got = cpu::conv_kernels(dtype, o.tiles, o.split);
        const ConvRow& convolve = conv_row("convolve", dtype, most);
        if (got.convolve != convolve.convolve || got.pack != conv_row("pack", dtype, most).pack) {
          report.fail("%s, tiles %d, split %d", dtype_name(dtype), o.tiles, o.split);
        }
        const bool tiles = convolve.isa == CpuIsa::kAmx, pairs = tiles || convolve.isa == CpuIsa::kAvx512Bf16;
        if (got.traits.pair != (tiles ? 32 : pairs ? 2 : 1)) report.fail("a step takes %d channels", got.traits.pair);
        const int parts = tiles && dtype == DType::kFloat32 ? o.split : 0;
        if (got.traits.split != parts) report.fail("splits floats into %d", got.traits.split);
        const int64_t unit = parts > 0 ? 2 * parts : pairs ? 2 : stat_size(dtype);
        if (got.traits.compute_size != unit) report.fail("computes in %d bytes", got.traits.compute_size);
      }
      for (const int64_t groups : {1, 2}) {
        const bool tiles = groups == 1 && dtype != DType::kFloat32;
        const CpuIsa most = tiles && cap == CpuIsa::kAmx ? cap : without_tiles;
        const ConvRow& row = conv_row("weight_gradient", dtype, most);
        if (cpu::conv_weight_kernel(dtype, groups).kernel != row.weight_gradient) {
          report.fail("%s weight gradient", dtype_name(dtype));
        }
      }
    }
    for (const int split : {0, 2, 3}) {
      const cpu::WeightKernelInfo weight = cpu::split_weight_kernel(split);
      const bool splits = cap == CpuIsa::kAmx && split > 0;
      if (weight.kernel != (splits ? conv_row("weight_gradient", DType::kFloat32, cap).weight_gradient : nullptr) ||
          weight.traits.split != (splits ? split : 0)) {
        report.fail("weight gradient of floats in %d parts", split);
      }
    }
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const cpu::ConvKernels grouped = cpu::grouped_kernels(dtype);
      const cpu::WeightKernelInfo weight = cpu::grouped_weight_kernel(dtype);
      if (dtype == DType::kFloat64 || cap == CpuIsa::kScalar) {  // none
        if (grouped.traits.width != 0 || weight.traits.width != 0) report.fail("%s grouped", dtype_name(dtype));
        continue;
      }
      const ConvRow& row = conv_row("grouped", dtype, without_tiles);
      if (grouped.convolve != row.convolve || grouped.pack != conv_row("grouped_pack", dtype, without_tiles).pack ||
          weight.kernel != conv_row("grouped_weight", dtype, cap).weight_gradient) {
        report.fail("%s grouped", dtype_name(dtype));
      }
      const bool pairs = row.isa == CpuIsa::kAvx512Bf16;
      if (grouped.traits.compute_size != (pairs ? 2 : 4) || weight.traits.unit_size != 4) {
        report.fail("%s grouped computes in %d and %d bytes", dtype_name(dtype), grouped.traits.compute_size,
                    weight.traits.unit_size);
      }
    }
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const cpu::ConvKernels winograd = cpu::winograd_kernels(dtype);
      if (winograd.convolve != conv_row("winograd", dtype, cap).convolve ||
          winograd.pack != conv_row("winograd_pack", dtype, cap).pack) {
        report.fail("%s winograd", dtype_name(dtype));
      }
    }
  }
  cpu::set_isa_cap(cpu::detected_isa());
  if (cpu::detected_isa() < CpuIsa::kAmx) return;
  report.begin("a first product of AMX tiles comes out right");
  if (!cpu::amx_works()) report.fail("it does not");
}

}  // namespace

void test_dispatch(Report& report) {
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);

  report.begin("kernel table: names are unique and say what the row says");
  std::set<std::string> names;
  for (size_t i = 0; i < count; ++i) {
    const KernelInfo& row = table[i];
    if (!names.insert(row.name).second) report.fail("%s stands twice", row.name);
    const std::string op = std::strcmp(row.op, "batch_norm") == 0 ? "bn" : row.op;
    const std::string pass = std::strcmp(row.pass, "convolve") == 0 ? "" : std::string("_") + row.pass;
    const std::string expected = op + pass + "_" + dtype_name(row.dtype) + "_" + isa_name(row.isa);
    if (row.name != expected) report.fail("%s, expected %s", row.name, expected.c_str());
  }

  report.begin("kernel table: each (op, pass, dtype) rises in level from a scalar row, which no two groups share");
  std::map<std::string, int> last;
  for (size_t i = 0; i < count; ++i) {
    const KernelInfo& row = table[i];
    const std::string key = std::string(row.op) + " " + row.pass + " " + dtype_name(row.dtype);
    const int level = static_cast<int>(row.isa);
    const auto before = last.find(key);
    const bool grouped = std::strncmp(row.pass, "grouped", 7) == 0;
    if (before == last.end() && (level != 0) != grouped) report.fail("%s: no scalar row first", row.name);
    if (before != last.end() && level <= before->second) report.fail("%s: out of order", row.name);
    last[key] = level;
  }
  for (const char* stem : {"batch_norm stats", "batch_norm apply", "batch_norm backward_reduce",
                           "batch_norm backward_apply", "pool forward", "pool backward_reduce", "pool backward_apply",
                           "conv convolve", "conv pack", "conv weight_gradient"}) {
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      if (!last.count(std::string(stem) + " " + dtype_name(dtype))) report.fail("%s %s: none", stem, dtype_name(dtype));
    }
  }

  check_split_choice(report);
  check_conv_levels(report);

  report.begin("names of levels parse back, others do not");
  for (int level = 0; level < kCpuIsaCount; ++level) {
    CpuIsa parsed = CpuIsa::kScalar;
    const auto isa = static_cast<CpuIsa>(level);
    if (!parse_isa(isa_name(isa), &parsed) || parsed != isa) report.fail("%s", isa_name(isa));
  }
  CpuIsa untouched = CpuIsa::kAvx2;
  if (parse_isa("avx9", &untouched) || untouched != CpuIsa::kAvx2) report.fail("avx9 was taken for a level");

  report.begin("bytes of a mask");
  for (Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
    for (int64_t length : {1, 7, 8, 9, 64}) {
      const Shape shape{2, length, 10 - length % 10, DType::kFloat32, layout};
      if (batch_norm_act_mask_bytes(shape) != mask_bytes(shape)) report.fail("of %s", shape_name(shape).c_str());
    }
  }
}

}  // namespace fused_resnet::native_test
