// Convolution as inference runs it: a weight packed once, and act(conv + bias + residual) before a tile is stored.
#include "conv_check.h"

namespace fused_resnet::native_test {
namespace {

enum class Residual { kNone, kApart, kInPlace };  // kInPlace: y is the residual's memory

struct InferenceCase {
  ConvCase conv;
  Residual residual = Residual::kNone;
  Activation end = Activation::kIdentity;
  std::string name() const {
    return "inference " + conv.name() + " residual " + std::to_string(static_cast<int>(residual)) + " end " +
           activation_name(end);
  }
};

struct InferenceData {
  ConvData conv;
  Values residual;
  Guarded residual_bytes, slope_bytes;
  ReferenceAct end;
};

InferenceData make_data(const InferenceCase& k) {
  const ConvShape& s = k.conv.shape;
  Random random(k.conv.seed * 104729 + 7);
  InferenceData d;
  d.conv = make_conv_data(k.conv);
  d.residual = random_values(random, s.y_numel(), s.dtype, 1, 0.125);
  if (k.conv.special == Special::kNanInTensors) d.residual[random.next() % d.residual.size()] = NAN;
  if (k.conv.special == Special::kInfInTensors) d.residual[random.next() % d.residual.size()] = INFINITY;
  d.residual_bytes = input_tensor(row_of(s.y_numel(), s.dtype), d.residual, k.conv.misaligned);
  d.end = {k.end, 0.375, {}};
  for (int64_t f = 0; f < s.k; ++f) d.end.slope.push_back(rounded(random.uniform(-1.5, 1.5), k.conv.stat()));
  d.slope_bytes = channel_array(d.end.slope, k.conv.stat());
  return d;
}

struct Packed {
  std::string format;
  Guarded bytes;
};

std::string format_of(const ConvShape& s, const ConvNumerics& numerics) {
  char text[256];
  cpu::conv_packed_format(s, numerics, text, sizeof(text));
  return text;
}

Packed pack(Report& report, const ConvCase& k, const ConvData& d, const ConvNumerics& numerics, const Runner& runner) {
  Packed packed{format_of(k.shape, numerics), Guarded(cpu::conv_packed_bytes(k.shape, numerics))};
  ConvPack p;
  p.shape = k.shape;
  p.weight = conv_weight(k, d);
  p.numerics = numerics;
  p.packed = packed.bytes.data();
  p.runner = runner;
  const Status status = cpu::conv_pack(p);
  if (!status.ok()) report.fail("pack: %s", status.message);
  expect_guards(report, "pack", packed.bytes);
  return packed;
}

struct Outputs {
  Guarded y, mean, rstd;
};

Outputs run(Report& report, const InferenceCase& k, InferenceData& d, const ConvNumerics& numerics,
            const Packed* packed, const Runner& runner) {
  const ConvCase& c = k.conv;
  Outputs out{conv_output(c, c.shape.y_numel()), stat_output(c, c.shape.k), stat_output(c, c.shape.k)};
  Guarded workspace(cpu::conv_forward_workspace(c.shape, numerics, runner.threads, packed != nullptr));
  ConvForward p;
  p.shape = c.shape;
  p.x = conv_input(c, d.conv);
  p.weight = conv_weight(c, d.conv);
  if (packed != nullptr) {
    p.packed = packed->bytes.data();
    if (!cpu::conv_reads_weight(c.shape, numerics, p.packed)) p.weight.data = nullptr;
  }
  if (c.bias) p.bias = d.conv.bias_bytes.data();
  p.y = out.y.data();
  if (k.residual == Residual::kApart) p.skip = d.residual_bytes.data();
  if (k.residual == Residual::kInPlace) {
    std::memcpy(out.y.data(), d.residual_bytes.data(), static_cast<size_t>(out.y.size()));
    p.skip = p.y;
  }
  p.act.kind = k.end;
  p.act.negative_slope = d.end.negative_slope;
  if (k.end == Activation::kPrelu) p.act.slope = d.slope_bytes.data();
  p.stats.batch_stats = c.stats;
  p.stats.mean = out.mean.data(), p.stats.rstd = out.rstd.data();
  p.numerics = numerics;
  p.workspace = workspace.data();
  p.runner = runner;
  const Status status = cpu::conv_forward(p);
  if (!status.ok()) report.fail("forward: %s", status.message);
  expect_all_guards(report, "forward", {&out.y, &out.mean, &out.rstd, &workspace});
  return out;
}

// act(conv + bias + residual), and what an error before the activation becomes behind it.
Terms reference(const InferenceCase& k, const InferenceData& d, Terms y) {
  constexpr double kSteepest = 1.1;  // silu's
  for_elements(y.value.size(), k.conv.shape.k, [&](size_t i, int64_t f) {
    const double bias = k.conv.bias ? d.conv.bias[static_cast<size_t>(f)] : 0;
    const double residual = k.residual == Residual::kNone ? 0 : d.residual[i];
    y.value[i] = act_value(d.end, y.value[i] + bias + residual, f);
    const double steepness = std::max(kSteepest, std::abs(d.end.a(f)));
    y.scale[i] = steepness * (y.scale[i] + std::abs(bias) + std::abs(residual)) + std::abs(y.value[i]);
    y.noise[i] *= steepness;
  });
  return y;
}

std::string plan(const ConvShape& s, cpu::ConvDirection direction, const ConvNumerics& numerics) {
  char text[1024];
  cpu::conv_plan(s, direction, numerics, text, sizeof(text));
  return text;
}

void expect_same_outputs(Report& report, const char* what, const Outputs& got, const Outputs& expected) {
  if (!got.y.same_bytes(expected.y)) report.fail("%s: another y", what);
  if (!got.mean.same_bytes(expected.mean)) report.fail("%s: another mean", what);
  if (!got.rstd.same_bytes(expected.rstd)) report.fail("%s: another rstd", what);
}

// NaN and infinities land where nine taps put them, whichever kernel it is.
void expect_same_classes(Report& report, const InferenceCase& k, const Outputs& got, const Outputs& expected) {
  const Values a = read_row(got.y, k.conv.shape.dtype), b = read_row(expected.y, k.conv.shape.dtype);
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isfinite(a[i]) && std::isfinite(b[i])) continue;
    const bool same = std::isnan(b[i]) ? std::isnan(a[i]) : a[i] == b[i];
    if (!same) report.fail("y[%zu] of the packed weight = %g, of nine taps %g", i, a[i], b[i]);
  }
}

void check_level(Report& report, CpuIsa isa, const InferenceCase& k, InferenceData& d, const Terms& direct,
                 const ConvNumerics& numerics) {
  const ConvCase& c = k.conv;
  const Level level{isa, c, numerics};
  const Terms y = reference(k, d, numerics.allow_winograd ? winograd_terms(direct, c.shape.k) : direct);
  const Outputs plain = run(report, k, d, numerics, nullptr, {});
  const Packed packed = pack(report, c, d.conv, numerics, {});
  const Outputs once = run(report, k, d, numerics, &packed, {});
  for (const Outputs* out : {&plain, &once}) {
    expect_terms(report, out == &plain ? "y" : "y of the packed weight", read_row(out->y, c.shape.dtype), y,
                 c.shape.dtype, c.stat(), sum_length_units(c, true), level.noise(c.has_norm ? 1 : 0));
  }
  // A weight that is transformed already makes Winograd cheaper: then the two are not the same kernel.
  if (plan(c.shape, cpu::ConvDirection::kForward, numerics) ==
      plan(c.shape, cpu::ConvDirection::kForwardPacked, numerics)) {
    expect_same_outputs(report, "packed", once, plain);
  }
  if (c.special != Special::kNone) expect_same_classes(report, k, once, run(report, k, d, {false, 0}, nullptr, {}));
  for (const Runner& runner : runners(c)) {
    expect_same_outputs(report, "other threads", run(report, k, d, numerics, nullptr, runner), plain);
    const Packed again = pack(report, c, d.conv, numerics, runner);
    expect_same_bytes(report, "packed weight", again.bytes, packed.bytes);
    expect_same_outputs(report, "packed, other threads", run(report, k, d, numerics, &again, runner), once);
  }
}

void run_case(Report& report, const std::vector<CpuIsa>& levels, const InferenceCase& k) {
  InferenceData d = make_data(k);
  Terms y = convolved(k.conv.shape, d.conv.a, d.conv.weight);
  no_claim_beside(d.conv.weight, k.conv.shape.k, [&](int64_t at) { return at % k.conv.shape.k; }, &y);
  for (CpuIsa isa : levels) {
    cpu::set_isa_cap(isa);
    report.begin(std::string(isa_name(isa)) + " " + k.name());
    for (const ConvNumerics& numerics : numerics_of(isa, k.conv.shape)) check_level(report, isa, k, d, y, numerics);
  }
}

constexpr Extent kShapes[] = {
    // 1x1: all pixels are one row, read in place; with a stride they are not
    {1, 1, 1, 1, 1, 1, 1},
    {2, 3, 5, 13, 33, 1, 1},
    {2, 7, 7, 16, 48, 1, 1},
    {1, 9, 7, 17, 5, 1, 1, 2, 2},
    // 3x3
    {1, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1},
    {2, 7, 7, 17, 33, 3, 3, 1, 1, 1, 1},
    {1, 9, 8, 32, 65, 3, 3, 1, 1, 1, 1},
    {1, 5, 6, 16, 3, 3, 3, 1, 1, 0, 2},
    {1, 9, 9, 17, 16, 3, 3, 2, 2, 1, 1},
    {1, 9, 10, 13, 18, 3, 3, 1, 1, 2, 2, 2, 2},
    // the stem's, and other windows
    {1, 17, 15, 3, 33, 7, 7, 2, 2, 3, 3},
    {1, 6, 7, 3, 17, 5, 5, 1, 1, 2, 2},
    {1, 16, 3, 13, 33, 3, 1, 1, 1, 1, 0},
    // groups
    {1, 6, 7, 8, 12, 3, 3, 1, 1, 1, 1, 1, 1, 2},
    // many filters, many channels
    {1, 3, 4, 40, 290, 1, 1},
    {1, 3, 4, 290, 33, 3, 3, 1, 1, 1, 1},
};
// Work enough for threads: a million multiplications.
constexpr Extent kTeam[] = {
    {1, 9, 9, 33, 65, 3, 3, 1, 1, 1, 1}, {2, 16, 16, 33, 65, 1, 1}, {1, 24, 24, 3, 65, 7, 7, 2, 2, 3, 3}};
// For every combination of residual and activation. The first takes Winograd where its weight is packed.
constexpr Extent kOptions[] = {
    {1, 8, 8, 17, 33, 3, 3, 1, 1, 1, 1}, {1, 7, 5, 34, 13, 1, 1}, {1, 6, 8, 9, 18, 3, 3, 2, 2, 1, 1}};

InferenceCase random_case(const Extent& e, DType dtype, uint64_t seed) {
  Random random(seed + 5000);
  InferenceCase k;
  k.conv.shape = e.shape(dtype);
  k.conv.seed = seed;
  k.conv.has_norm = random.next() % 3 == 0;
  k.conv.act = pick<Activation>(random, kActivationCount);
  k.conv.bias = random.next() % 3 != 0;
  k.conv.misaligned = random.next() % 3 == 0;
  k.conv.layout = pick<WeightLayout>(random, 3);
  k.residual = pick<Residual>(random, 3);
  k.end = pick<Activation>(random, kActivationCount);
  return k;
}

void run_cases(Report& report, const std::vector<CpuIsa>& levels, DType dtype, uint64_t seed) {
  for (const Extent& e : kShapes) run_case(report, levels, random_case(e, dtype, ++seed));
  for (const Extent& e : kTeam) {
    InferenceCase k = random_case(e, dtype, ++seed);
    k.conv.threads = true;
    run_case(report, levels, k);
  }
  for (const Extent& e : kOptions) {
    for (int end = 0; end < kActivationCount; ++end) {
      for (int residual = 0; residual < 3; ++residual) {
        InferenceCase k = random_case(e, dtype, ++seed);
        k.end = static_cast<Activation>(end);
        k.residual = static_cast<Residual>(residual);
        k.conv.bias = true;
        k.conv.has_norm = residual == end % 3;
        run_case(report, levels, k);
      }
    }
    for (Special special :
         {Special::kNanInTensors, Special::kInfInTensors, Special::kNanInWeight, Special::kInfInWeight}) {
      for (int residual = 0; residual < 3; ++residual) {
        InferenceCase k = random_case(e, dtype, ++seed);
        k.conv.special = special;
        k.residual = static_cast<Residual>(residual);
        run_case(report, levels, k);
      }
    }
    InferenceCase k = random_case(e, dtype, ++seed);
    k.conv.stats = true;
    k.end = Activation::kIdentity;
    k.residual = Residual::kNone;
    run_case(report, levels, k);
  }
}

// One packed weight serves all extents of its format.
void check_formats(Report& report, CpuIsa isa, DType dtype) {
  cpu::set_isa_cap(isa);
  report.begin(std::string(isa_name(isa)) + " packed formats of " + dtype_name(dtype));
  struct Made {
    InferenceCase k;
    InferenceData d;
    Packed packed;
    Outputs out;
  };
  std::vector<Made> made;
  for (const auto& [n, h, w] : {std::array<int64_t, 3>{1, 3, 3}, {1, 7, 7}, {2, 9, 5}, {3, 14, 14}}) {
    Made m;
    m.k.conv.shape = Extent{n, h, w, 48, 33, 3, 3, 1, 1, 1, 1}.shape(dtype);
    m.k.end = Activation::kRelu;
    m.d = make_data(m.k);
    if (!made.empty()) {  // x is the extent's, the weight is the same
      m.d.conv.weight = made[0].d.conv.weight;
      std::memcpy(m.d.conv.weight_bytes.data(), made[0].d.conv.weight_bytes.data(),
                  static_cast<size_t>(m.d.conv.weight_bytes.size()));
    }
    m.packed = pack(report, m.k.conv, m.d.conv, {true, 0}, {});
    m.out = run(report, m.k, m.d, {true, 0}, &m.packed, {});
    if (m.packed.format.empty()) report.fail("a format without a name");
    made.push_back(std::move(m));
  }
  for (Made& m : made) {
    for (const Made& other : made) {
      if (m.packed.format != other.packed.format) continue;
      if (m.packed.bytes.size() != other.packed.bytes.size()) {
        report.fail("%s: two sizes", m.packed.format.c_str());
        continue;
      }
      expect_same_outputs(report, "the weight packed for another extent",
                          run(report, m.k, m.d, {true, 0}, &other.packed, {}), m.out);
    }
  }
}

// Fourteen by fourteen positions do not pay for a transformed weight, unless somebody has transformed it before.
void check_winograd_of_packed(Report& report, CpuIsa isa) {
  cpu::set_isa_cap(isa);
  report.begin(std::string(isa_name(isa)) + " Winograd of a packed weight");
  const ConvShape s = Extent{1, 14, 14, 64, 64, 3, 3, 1, 1, 1, 1}.shape(DType::kFloat32);
  const auto transforms = [&](cpu::ConvDirection direction, bool allowed) {
    return plan(s, direction, {allowed, 0}).find("winograd") != std::string::npos;
  };
  const std::string format = format_of(s, {true, 0});
  if (!transforms(cpu::ConvDirection::kForwardPacked, true) || format.find("winograd") == std::string::npos) {
    report.fail("taken: %s, packed by %s", plan(s, cpu::ConvDirection::kForwardPacked, {true, 0}).c_str(),
                format.c_str());
  }
  if (transforms(cpu::ConvDirection::kForwardPacked, false)) report.fail("taken though it is not allowed");
  if (format_of(s, {false, 0}) == format) report.fail("one format with and without it");
}

void check_refusals(Report& report) {
  report.begin("refused inference convolutions");
  InferenceCase k;
  k.conv.shape = Extent{1, 4, 4, 3, 5, 1, 1}.shape(DType::kFloat32);
  k.end = Activation::kRelu;
  InferenceData d = make_data(k);
  Guarded y = conv_output(k.conv, k.conv.shape.y_numel()), mean = stat_output(k.conv, 5), rstd = stat_output(k.conv, 5);
  Guarded workspace(cpu::conv_forward_workspace(k.conv.shape, {}, 1));
  const Guarded untouched = conv_output(k.conv, k.conv.shape.y_numel());
  ConvForward p;
  p.shape = k.conv.shape;
  p.x = conv_input(k.conv, d.conv);
  p.weight = conv_weight(k.conv, d.conv);
  p.act.kind = k.end;
  p.y = y.data();
  p.stats.batch_stats = true;
  p.stats.mean = mean.data(), p.stats.rstd = rstd.data();
  p.workspace = workspace.data();
  const Status status = cpu::conv_forward(p);
  if (status.ok() || std::strstr(status.message, "statistics") == nullptr) report.fail("statistics of an activation");
  expect_same_bytes(report, "y of a refused call", y, untouched);

  ConvPack pack;
  pack.shape = k.conv.shape;
  pack.shape.n = 0;
  if (cpu::conv_pack(pack).ok()) report.fail("packed for an empty tensor");
  ConvShape wide = k.conv.shape;
  wide.r = wide.s = 17, wide.pad_h = wide.pad_w = 8;
  pack.shape = wide;
  if (cpu::conv_pack(pack).ok()) report.fail("packed a weight of 17 x 17 taps");
}

}  // namespace

void test_conv_inference(Report& report, const std::vector<CpuIsa>& all) {
  uint64_t seed = 0;
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const std::vector<CpuIsa> levels = own_levels(all, "conv", dtype);
    run_cases(report, levels, dtype, seed);
    seed += 1000;
    for (CpuIsa isa : levels) check_formats(report, isa, dtype);
  }
  for (CpuIsa isa : own_levels(all, "conv", DType::kFloat32)) check_winograd_of_packed(report, isa);
  check_refusals(report);
}

}  // namespace fused_resnet::native_test
