// Convolution: every kernel of every level against the reference. csrc/include/fused_resnet/conv.h is the contract.
#include "fused_resnet/conv.h"

#include <algorithm>
#include <cstring>

#include "conv_case.h"
#include "fused_resnet/capability.h"
#include "runners.h"

namespace fused_resnet::native_test {
namespace {

// What a level does with a case: where operands or products are rounded, the bound says so.
struct Level {
  CpuIsa isa;
  const ConvCase& k;
  bool winograd = false;

  // Kernels that multiply bfloat16 round the operand that a prologue made; the others compute in the stat dtype.
  bool rounds() const { return k.shape.dtype == DType::kBFloat16 && isa >= CpuIsa::kAvx512Bf16; }
  double noise(int rounded_operands) const {
    return rounds() ? kNoiseUnits * rounding_unit(DType::kBFloat16) * std::sqrt(rounded_operands) : 0;
  }
};

// Winograd's F(4x4, 3x3): products of differences, of any of the 36 elements that a tile's result depends on.
constexpr double kWinogradUnits = 4;
bool winograd_possible(const ConvShape& s) {
  return s.dtype != DType::kFloat64 && s.groups == 1 && s.r == 3 && s.s == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1;
}
// The magnitudes of a channel's largest sum stand for those of all the tile's.
Terms winograd_terms(Terms terms, int64_t channels) {
  Values largest(static_cast<size_t>(channels), 0);
  for_elements(terms.value.size(), channels, [&](size_t i, int64_t c) {
    double& most = largest[static_cast<size_t>(c)];
    if (std::isfinite(terms.scale[i])) most = std::max(most, terms.scale[i]);
  });
  for_elements(terms.value.size(), channels, [&](size_t i, int64_t c) {
    if (std::isfinite(terms.scale[i])) terms.scale[i] = kWinogradUnits * largest[static_cast<size_t>(c)];
  });
  return terms;
}

constexpr double kEps = NormParams{}.eps;

enum class NotFinite { kSame, kAny };  // whether a NaN may stand for an infinity

// `noise`: of the operands' roundings, beside the bound that all kernels keep.
void expect_terms(Report& report, const char* what, const Values& got, const Terms& expected, DType stored, DType stat,
                  double units, double noise, NotFinite not_finite = NotFinite::kSame) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double value = expected.value[i];
    if (!std::isfinite(value)) {
      const bool same = std::isnan(value) ? std::isnan(got[i]) : got[i] == value;
      const bool any = not_finite == NotFinite::kAny || std::isnan(expected.scale[i]);
      if (same || (any && !std::isfinite(got[i]))) continue;
      report.fail("%s[%zu] = %.9g, expected %.9g", what, i, got[i], value);
      continue;
    }
    const double limit = bound(value, expected.scale[i], stored, stat, units) + noise * expected.noise[i];
    const double error = std::abs(got[i] - value);
    if (!std::isfinite(limit)) continue;  // no claim is made
    if (error <= limit) {
      largest_part_of_bound() = std::max(largest_part_of_bound(), error / limit);
    } else {
      report.fail("%s[%zu] = %.9g, expected %.9g, error %.3g > %.3g", what, i, got[i], value, error, limit);
    }
  }
}

Values read_row(const Guarded& bytes, DType dtype) {
  return read_tensor(row_of(bytes.size() / element_size(dtype), dtype), bytes);
}

Guarded conv_output(const ConvCase& k, int64_t count) {
  return Guarded(count * element_size(k.shape.dtype), k.misaligned ? element_size(k.shape.dtype) : 0);
}
Guarded stat_output(const ConvCase& k, int64_t count) { return Guarded(count * element_size(k.stat())); }

void expect_all_guards(Report& report, const char* what, std::initializer_list<const Guarded*> buffers) {
  for (const Guarded* buffer : buffers) expect_guards(report, what, *buffer);
}

struct ForwardOutputs {
  Guarded y, mean, rstd, var;
};

ForwardOutputs run_forward(Report& report, const ConvCase& k, ConvData& d, bool allow_winograd, const Runner& runner) {
  ForwardOutputs out{conv_output(k, k.shape.y_numel()), stat_output(k, k.shape.k), stat_output(k, k.shape.k),
                     stat_output(k, k.shape.k)};
  Guarded workspace(cpu::conv_forward_workspace(k.shape, runner.threads));
  ConvForward p;
  p.shape = k.shape;
  p.x = conv_input(k, d);
  p.weight = conv_weight(k, d);
  if (k.bias) p.bias = d.bias_bytes.data();
  p.y = out.y.data();
  p.stats.batch_stats = k.stats;
  p.stats.mean = out.mean.data(), p.stats.rstd = out.rstd.data();
  if (k.wants_var()) p.stats.var = out.var.data();
  p.allow_winograd = allow_winograd;
  p.workspace = workspace.data();
  p.runner = runner;
  const Status status = cpu::conv_forward(p);
  if (!status.ok()) report.fail("forward: %s", status.message);
  expect_all_guards(report, "forward", {&out.y, &out.mean, &out.rstd, &out.var, &workspace});
  return out;
}

// Zeros of the padding may meet a factor that is not finite, or not: nothing is said of what would be finite then.
// `factor` is the weight in y and dx, dz in the gradient of the weight; channel_of(index in it) is of the result.
template <class F>
void no_claim_beside(const Result& factor, int64_t channels, F channel_of, Terms* terms) {
  const auto bad = std::find_if(factor.value.begin(), factor.value.end(), [](double v) { return !std::isfinite(v); });
  if (bad == factor.value.end()) return;
  const int64_t channel = channel_of(bad - factor.value.begin());
  for_elements(terms->value.size(), channels, [&](size_t i, int64_t c) {
    if (c == channel) terms->scale[i] = NAN;
  });
}

double sum_length_units(const ConvCase& k, bool forward) {
  return sum_units((forward ? k.shape.c : k.shape.k) / k.shape.groups * k.taps());
}

void check_forward(Report& report, const Level& level, const Terms& direct, const ForwardOutputs& out) {
  const ConvCase& k = level.k;
  const Terms y = level.winograd ? winograd_terms(direct, k.shape.k) : direct;
  const double units = sum_length_units(k, true), noise = level.noise(k.has_norm ? 1 : 0);
  expect_terms(report, "y", read_row(out.y, k.shape.dtype), y, k.shape.dtype, k.stat(), units, noise);
  if (!k.stats) return;
  const Statistics expected = statistics(read_row(out.y, k.shape.dtype), k.shape.k, k.shape.dtype);
  const Values rstd = read_row(out.rstd, k.stat());
  Values var = read_row(out.var, k.stat());
  const auto expect = [&](const char* what, const Values& got, const Terms& terms) {
    const double sum = sum_units(k.shape.y_numel() / k.shape.k);
    expect_terms(report, what, got, terms, k.stat(), k.stat(), sum, 0, NotFinite::kAny);
  };
  expect("mean", read_row(out.mean, k.stat()), expected.mean);
  if (k.wants_var()) expect("var", var, expected.var);
  for (size_t c = 0; c < rstd.size(); ++c) {
    const double of_var = k.wants_var() ? var[c] : expected.var.value[c], from_var = 1 / std::sqrt(of_var + kEps);
    const double limit = (k.wants_var() ? 4 : 4 + sum_units(k.shape.y_numel())) * rounding_unit(k.stat()) * from_var;
    if (std::isfinite(from_var) ? !(std::abs(rstd[c] - from_var) <= limit) : std::isfinite(rstd[c])) {
      report.fail("rstd[%zu] = %.9g of variance %.9g", c, rstd[c], of_var);
    }
  }
}

struct DataOutputs {
  Guarded dx, dweight, dbias;
};

DataOutputs run_data(Report& report, const ConvCase& k, ConvData& d, bool allow_winograd, const Runner& runner) {
  DataOutputs out{conv_output(k, k.shape.x_numel()), stat_output(k, k.shape.c), stat_output(k, k.shape.c)};
  Guarded workspace(cpu::conv_backward_data_workspace(k.shape, runner.threads));
  ConvBackwardData p;
  p.shape = k.shape;
  p.dy = conv_gradient(k, d);
  p.weight = conv_weight(k, d);
  p.x = conv_input(k, d);
  if (!k.has_norm) p.x.data = nullptr;
  p.dweight = out.dweight.data(), p.dbias = out.dbias.data();
  if (!k.has_norm && k.skip != Skip::kNone) p.skip = d.skip_bytes.data();
  if (!k.has_norm && k.skip == Skip::kMask) p.skip_mask = d.skip_mask.data();
  p.dx = out.dx.data();
  p.allow_winograd = allow_winograd;
  p.workspace = workspace.data();
  p.runner = runner;
  const Status status = cpu::conv_backward_data(p);
  if (!status.ok()) report.fail("data gradient: %s", status.message);
  expect_all_guards(report, "data gradient", {&out.dx, &out.dweight, &out.dbias, &workspace});
  return out;
}

// dx from the gradient of the operand.
Terms data_epilogue(const ConvCase& k, const ConvData& d, Terms dx) {
  for_elements(dx.value.size(), k.shape.c, [&](size_t i, int64_t c) {
    if (k.has_norm) {
      const double derivative = act_derivative(d.act, d.pre.value[i], c);
      const bool smooth = !has_kink(k.act) && k.act != Activation::kIdentity;
      if (derivative == 0 && k.act == Activation::kRelu) {  // blocks even a NaN
        dx.value[i] = dx.scale[i] = dx.noise[i] = 0;
        return;
      }
      dx.value[i] *= derivative;
      dx.scale[i] *= std::abs(derivative) + (smooth ? 1 + d.pre.scale[i] : 0);
      dx.noise[i] *= std::abs(derivative);
    } else if (k.skip != Skip::kNone) {
      dx.value[i] += d.skip.value[i];
      dx.scale[i] += d.skip.scale[i];
    }
  });
  return dx;
}

void check_data(Report& report, const Level& level, const ConvData& d, const Terms& direct, const DataOutputs& out) {
  const ConvCase& k = level.k;
  const Terms dx = data_epilogue(k, d, level.winograd ? winograd_terms(direct, k.shape.c) : direct);
  const double units = sum_length_units(k, false), noise = level.noise(k.gradient_norm() ? 1 : 0);
  expect_terms(report, "dx", read_row(out.dx, k.shape.dtype), dx, k.shape.dtype, k.stat(), units, noise);
  if (!k.has_norm) return;
  const ReferenceNorm& norm = d.input.values;
  const double sum = units + sum_units(k.shape.x_numel() / k.shape.c);
  const Terms dbias = channel_sums(dx, k.shape.c, k.taps(), [](size_t, size_t) { return 1.0; });
  const Terms dweight = channel_sums(dx, k.shape.c, k.taps(),
                                     [&](size_t i, size_t c) { return (d.x.value[i] - norm.mean[c]) * norm.rstd[c]; });
  const auto expect = [&](const char* what, const Guarded& got, const Terms& terms) {
    expect_terms(report, what, read_row(got, k.stat()), terms, k.stat(), k.stat(), sum, noise, NotFinite::kAny);
  };
  expect("dbias", out.dbias, dbias);
  expect("dweight", out.dweight, dweight);
}

struct WeightOutputs {
  Guarded dweight, dbias;
};

WeightOutputs run_weight(Report& report, const ConvCase& k, ConvData& d, const Runner& runner) {
  WeightOutputs out{conv_output(k, static_cast<int64_t>(d.weight.value.size())), stat_output(k, k.shape.k)};
  Guarded workspace(cpu::conv_backward_weight_workspace(k.shape, runner.threads));
  ConvBackwardWeight p;
  p.shape = k.shape;
  p.dy = conv_gradient(k, d);
  p.x = conv_input(k, d);
  p.dweight = out.dweight.data();
  p.layout = weight_strides(k.shape, k.layout);
  if (k.dbias) p.dbias = out.dbias.data();
  p.workspace = workspace.data();
  p.runner = runner;
  const Status status = cpu::conv_backward_weight(p);
  if (!status.ok()) report.fail("weight gradient: %s", status.message);
  expect_all_guards(report, "weight gradient", {&out.dweight, &out.dbias, &workspace});
  return out;
}

void check_weight(Report& report, const Level& level, const ConvData& d, const Terms& dweight,
                  const WeightOutputs& out) {
  const ConvCase& k = level.k;
  const int64_t count = k.shape.y_numel() / k.shape.k, unit = element_size(k.shape.dtype);
  Values got;
  for_weight(k.shape, weight_strides(k.shape, k.layout),
             [&](size_t, int64_t at) { got.push_back(decode(out.dweight.data() + at * unit, k.shape.dtype)); });
  const int rounded_operands = (k.has_norm ? 1 : 0) + (k.gradient_norm() ? 1 : 0);
  expect_terms(report, "dweight", got, dweight, k.shape.dtype, k.stat(), sum_units(count),
               level.noise(rounded_operands));
  if (!k.dbias) return;
  Terms dz;
  dz.value = d.dz.value, dz.scale = d.dz.scale, dz.noise.assign(dz.value.size(), 0);
  expect_terms(report, "dbias", read_row(out.dbias, k.stat()),
               channel_sums(dz, k.shape.k, 1, [](size_t, size_t) { return 1.0; }), k.stat(), k.stat(), sum_units(count),
               0, NotFinite::kAny);
}

// Several threads cost time.
std::vector<Runner> runners(const ConvCase& k) {
  if (!k.threads) return {shuffled_runner()};
  return {threaded_runner<1>(), threaded_runner<2>(), threaded_runner<3>(), threaded_runner<5>(), shuffled_runner()};
}

void run_case(Report& report, const std::vector<CpuIsa>& levels, const ConvCase& k) {
  const ConvShape& s = k.shape;
  if (!cpu::conv_supported(s) || s.out_h() < 1 || s.out_w() < 1) {
    report.begin("conv " + k.name());
    report.fail("not supported");
    return;
  }
  ConvData d = make_conv_data(k);
  Terms y = convolved(s, d.a, d.weight), dx = data_gradient(s, d.dz, d.weight);
  Terms dweight = weight_gradient(s, d.dz, d.a);
  for_elements(y.value.size(), s.k, [&](size_t i, int64_t c) {
    const double bias = k.bias ? d.bias[static_cast<size_t>(c)] : 0;
    y.value[i] += bias, y.scale[i] += std::abs(bias);
  });
  const auto filter = [&](int64_t at) { return at % s.k; };
  no_claim_beside(d.weight, s.k, filter, &y);
  no_claim_beside(
      d.weight, s.c,
      [&](int64_t at) { return at / s.k % (s.c / s.groups) + at % s.k / (s.k / s.groups) * (s.c / s.groups); }, &dx);
  no_claim_beside(d.dz, s.k, filter, &dweight);

  for (CpuIsa isa : levels) {
    cpu::set_isa_cap(isa);
    report.begin(std::string(isa_name(isa)) + " conv " + k.name());
    for (const bool winograd : {false, true}) {
      if (winograd && !winograd_possible(s)) continue;
      const Level level{isa, k, winograd};
      const ForwardOutputs forward = run_forward(report, k, d, winograd, {});
      check_forward(report, level, y, forward);
      const DataOutputs data = run_data(report, k, d, winograd, {});
      check_data(report, level, d, dx, data);
      for (const Runner& runner : runners(k)) {
        const ForwardOutputs again = run_forward(report, k, d, winograd, runner);
        expect_same_bytes(report, "y", again.y, forward.y);
        expect_same_bytes(report, "mean", again.mean, forward.mean);
        expect_same_bytes(report, "rstd", again.rstd, forward.rstd);
        const DataOutputs repeated = run_data(report, k, d, winograd, runner);
        expect_same_bytes(report, "dx", repeated.dx, data.dx);
        expect_same_bytes(report, "dweight of the norm", repeated.dweight, data.dweight);
        expect_same_bytes(report, "dbias of the norm", repeated.dbias, data.dbias);
      }
    }
    const WeightOutputs weight = run_weight(report, k, d, {});
    check_weight(report, {isa, k}, d, dweight, weight);
    for (const Runner& runner : runners(k)) {
      const WeightOutputs again = run_weight(report, k, d, runner);
      expect_same_bytes(report, "dweight", again.dweight, weight.dweight);
      expect_same_bytes(report, "dbias", again.dbias, weight.dbias);
    }
  }
}

// n, h, w, c, k, taps, stride, pad, dilation, groups
struct Extent {
  int64_t n, h, w, c, k, r, s, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1,
                               groups = 1;
  ConvShape shape(DType dtype) const {
    return {n, h, w, c, k, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, dtype};
  }
};

// Tails of channels, filters, positions and taps.
constexpr Extent kShapes[] = {
    // 1x1: all pixels are one row; with a stride or padding they are not
    {1, 1, 1, 1, 1, 1, 1},
    {3, 2, 3, 3, 65, 1, 1},
    {1, 1, 15, 13, 33, 1, 1},
    {2, 7, 7, 16, 16, 1, 1},
    {1, 4, 4, 17, 32, 1, 1},
    {1, 3, 9, 32, 17, 1, 1},
    {2, 1, 14, 33, 13, 1, 1},
    {1, 5, 13, 65, 3, 1, 1},
    {1, 9, 9, 17, 33, 1, 1, 2, 2},
    {2, 8, 11, 33, 16, 1, 1, 2, 3},
    {1, 3, 3, 3, 5, 1, 1, 1, 1, 1, 1},
    {1, 6, 5, 13, 17, 1, 1, 3, 3, 2, 1},
    // 3x3
    {1, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1},
    {1, 3, 3, 3, 17, 3, 3},
    {2, 4, 4, 13, 16, 3, 3, 1, 1, 1, 1},
    {1, 5, 6, 16, 33, 3, 3, 1, 1, 1, 1},
    {2, 9, 8, 17, 17, 3, 3, 1, 1, 1, 1},
    {1, 10, 17, 32, 32, 3, 3, 1, 1, 1, 1},
    {1, 7, 7, 33, 65, 3, 3, 1, 1, 1, 1},
    {2, 7, 7, 65, 13, 3, 3, 1, 1, 1, 1},
    {3, 7, 7, 16, 32, 3, 3, 1, 1, 1, 1},
    {1, 2, 13, 17, 3, 3, 3, 1, 1, 2, 2},
    {1, 2, 2, 3, 16, 3, 3, 1, 1, 3, 3},
    {1, 4, 7, 16, 17, 3, 3, 1, 1, 0, 3},
    {2, 3, 1, 5, 4, 3, 3, 1, 1, 1, 2},
    // strides, of both directions and of one
    {1, 8, 8, 17, 33, 3, 3, 2, 2, 1, 1},
    {2, 9, 7, 32, 13, 3, 3, 2, 2, 1, 1},
    {1, 7, 13, 13, 16, 3, 3, 2, 1, 1, 1},
    {1, 6, 9, 3, 17, 3, 3, 1, 2, 1, 0},
    {1, 11, 10, 16, 16, 3, 3, 3, 3, 1, 1},
    {2, 8, 9, 33, 3, 3, 3, 3, 2, 0, 2},
    {1, 12, 12, 5, 7, 3, 3, 5, 4, 1, 1},
    {1, 2, 3, 4, 6, 3, 3, 7, 9, 3, 3},
    // dilation
    {1, 9, 9, 17, 16, 3, 3, 1, 1, 2, 2, 2, 2},
    {2, 8, 10, 16, 33, 3, 3, 1, 1, 0, 3, 1, 3},
    {1, 11, 9, 3, 13, 3, 3, 2, 2, 2, 3, 2, 3},
    {1, 10, 12, 13, 17, 3, 3, 2, 3, 3, 3, 3, 2},
    {1, 6, 6, 33, 16, 3, 3, 3, 3, 4, 4, 3, 3},
    // other windows
    {1, 6, 7, 3, 17, 5, 5, 1, 1, 2, 2},
    {2, 9, 9, 13, 16, 5, 5, 2, 2, 2, 2},
    {1, 3, 4, 16, 3, 5, 5, 1, 1, 7, 6},
    {1, 17, 15, 3, 33, 7, 7, 2, 2, 3, 3},
    {2, 7, 7, 1, 13, 7, 7},
    {1, 3, 5, 17, 5, 7, 7, 1, 1, 3, 3},
    {1, 14, 16, 3, 16, 7, 7, 3, 2, 3, 2},
    {1, 5, 16, 16, 17, 1, 3, 1, 1, 0, 1},
    {2, 1, 17, 33, 13, 1, 3, 1, 2, 0, 1},
    {1, 16, 3, 13, 33, 3, 1, 1, 1, 1, 0},
    {1, 9, 2, 32, 16, 3, 1, 2, 1, 1, 0},
    {1, 4, 20, 2, 3, 1, 16, 1, 1, 0, 8},
    {1, 18, 3, 5, 2, 16, 2, 1, 1, 4, 1},
    {1, 23, 23, 3, 9, 11, 11, 4, 4, 2, 2},
    // groups
    {1, 6, 7, 8, 12, 3, 3, 1, 1, 1, 1, 1, 1, 2},
    {2, 5, 5, 64, 32, 3, 3, 2, 2, 1, 1, 1, 1, 4},
    {1, 7, 7, 68, 132, 1, 1, 1, 1, 0, 0, 1, 1, 2},
    {3, 7, 7, 24, 40, 3, 3, 1, 1, 1, 1, 1, 1, 4},
    {1, 4, 9, 16, 32, 3, 3, 1, 1, 1, 1, 1, 1, 8},
    {1, 9, 4, 72, 76, 1, 3, 1, 2, 0, 1, 1, 1, 2},
    // groups that share a vector
    {1, 1, 1, 4, 4, 1, 1, 1, 1, 0, 0, 1, 1, 2},
    {2, 5, 7, 12, 12, 3, 3, 1, 1, 1, 1, 1, 1, 3},
    {3, 7, 7, 40, 40, 3, 3, 1, 1, 1, 1, 1, 1, 10},
    {1, 4, 31, 24, 24, 3, 3, 1, 1, 1, 1, 1, 1, 3},
    {2, 9, 14, 32, 32, 3, 3, 2, 2, 1, 1, 1, 1, 8},
    {1, 8, 9, 18, 18, 3, 3, 2, 1, 1, 1, 1, 1, 9},
    {5, 4, 4, 20, 20, 3, 3, 1, 1, 2, 1, 1, 1, 5},
    {1, 10, 11, 40, 40, 3, 3, 2, 3, 3, 3, 3, 2, 5},
    {2, 6, 9, 16, 16, 5, 2, 1, 1, 2, 1, 1, 1, 4},
    {1, 9, 9, 24, 24, 1, 1, 2, 2, 0, 0, 1, 1, 6},
    {1, 1, 1100, 8, 8, 1, 3, 1, 1, 0, 1, 1, 1, 2},
    // rows of many units, blocks and slices; many channels
    {1, 1, 1030, 3, 3, 1, 3, 1, 1, 0, 1},
    {1, 2, 1100, 17, 5, 1, 1, 1, 2},
    {1, 1, 2100, 5, 17, 1, 1},
    {4, 24, 24, 3, 5, 3, 3, 1, 1, 1, 1},
    {9, 17, 17, 2, 3, 3, 3, 1, 1, 1, 1},
    {1, 3, 5, 600, 40, 1, 1},
    {1, 3, 4, 40, 600, 1, 1},
    {1, 3, 4, 290, 33, 3, 3, 1, 1, 1, 1},
};
// Work enough for threads: a million multiplications.
constexpr Extent kTeam[] = {
    {1, 9, 9, 33, 65, 3, 3, 1, 1, 1, 1},
    {3, 7, 7, 32, 36, 3, 3, 1, 1, 1, 1},
    {2, 16, 16, 33, 65, 1, 1},
    {1, 16, 15, 32, 65, 3, 3, 2, 2, 1, 1},
    {1, 24, 24, 3, 65, 7, 7, 2, 2, 3, 3},
    {1, 8, 8, 68, 68, 3, 3, 1, 1, 1, 1, 1, 1, 2},
    {4, 15, 28, 72, 72, 3, 3, 1, 1, 1, 1, 1, 1, 18},
};
// For every combination of what stands before and after.
constexpr Extent kOptions[] = {{2, 5, 6, 17, 33, 3, 3, 1, 1, 1, 1},
                               {1, 7, 5, 34, 13, 1, 1},
                               {1, 6, 8, 9, 18, 3, 3, 2, 2, 1, 1},
                               {2, 5, 7, 20, 20, 3, 3, 1, 1, 1, 1, 1, 1, 5}};

template <class E>
E pick(Random& random, int count) {
  return static_cast<E>(random.next() % static_cast<uint64_t>(count));
}

ConvCase random_case(const Extent& e, DType dtype, uint64_t seed) {
  Random random(seed + 1000);
  ConvCase k;
  k.shape = e.shape(dtype);
  k.seed = seed;
  k.has_norm = random.next() % 3 != 0;
  k.act = pick<Activation>(random, kActivationCount);
  k.affine = random.next() % 4 != 0;
  k.bias = random.next() % 2 == 0;
  k.stats = random.next() % 4 != 0;
  k.dbias = random.next() % 2 == 0;
  k.misaligned = random.next() % 3 == 0;
  k.dy = pick<Gradient>(random, 6);
  k.skip = pick<Skip>(random, 3);
  k.layout = pick<WeightLayout>(random, 3);
  return k;
}

}  // namespace

void test_conv(Report& report, const std::vector<CpuIsa>& all) {
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);
  uint64_t seed = 0;
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    std::vector<CpuIsa> levels;  // that have kernels of their own
    for (CpuIsa isa : all) {
      const auto ours = [&](const KernelInfo& row) {
        return std::strcmp(row.op, "conv") == 0 && row.dtype == dtype && row.isa == isa;
      };
      if (std::any_of(table, table + count, ours)) levels.push_back(isa);
    }
    for (const Extent& e : kShapes) run_case(report, levels, random_case(e, dtype, ++seed));
    for (const Extent& e : kTeam) {
      ConvCase k = random_case(e, dtype, ++seed);
      k.threads = true;
      run_case(report, levels, k);
    }
    for (const Extent& e : kOptions) {
      for (int act = 0; act < kActivationCount; ++act) {
        ConvCase k = random_case(e, dtype, ++seed);
        k.has_norm = true;
        k.act = static_cast<Activation>(act);
        k.stats = true;
        run_case(report, levels, k);
      }
      for (int dy = 0; dy < 6; ++dy) {
        for (int skip = 0; skip < 3; ++skip) {
          ConvCase k = random_case(e, dtype, ++seed);
          k.has_norm = false;
          k.dy = static_cast<Gradient>(dy);
          k.skip = static_cast<Skip>(skip);
          k.layout = static_cast<WeightLayout>((dy + skip) % 3);
          k.dbias = true;
          run_case(report, levels, k);
        }
      }
      for (Special special :
           {Special::kNanInTensors, Special::kInfInTensors, Special::kNanInWeight, Special::kInfInWeight}) {
        for (int i = 0; i < 2; ++i) {
          ConvCase k = random_case(e, dtype, ++seed);
          k.special = special;
          run_case(report, levels, k);
        }
      }
      ConvCase k = random_case(e, dtype, ++seed);  // variance that a sum of squares would lose
      k.bias = k.stats = true;
      k.offset = 2000;
      run_case(report, levels, k);
    }
  }
}

}  // namespace fused_resnet::native_test
