// Convolution: every kernel of every level against the reference. csrc/include/fused_resnet/conv.h is the contract.
#include "fused_resnet/conv.h"

#include "conv_check.h"

namespace fused_resnet::native_test {
namespace {

constexpr double kEps = NormParams{}.eps;

struct ForwardOutputs {
  Guarded y, mean, rstd, var;
};

ForwardOutputs run_forward(Report& report, const ConvCase& k, ConvData& d, const ConvNumerics& numerics,
                           const Runner& runner) {
  ForwardOutputs out{conv_output(k, k.shape.y_numel()), stat_output(k, k.shape.k), stat_output(k, k.shape.k),
                     stat_output(k, k.shape.k)};
  Guarded workspace(cpu::conv_forward_workspace(k.shape, numerics, runner.threads));
  ConvForward p;
  p.shape = k.shape;
  p.x = conv_input(k, d);
  p.weight = conv_weight(k, d);
  if (k.bias) p.bias = d.bias_bytes.data();
  if (k.skip != Skip::kNone) p.skip = d.added_bytes.data();
  p.y = out.y.data();
  p.stats.batch_stats = k.stats;
  p.stats.mean = out.mean.data(), p.stats.rstd = out.rstd.data();
  if (k.wants_var()) p.stats.var = out.var.data();
  p.numerics = numerics;
  p.workspace = workspace.data();
  p.runner = runner;
  const Status status = cpu::conv_forward(p);
  if (!status.ok()) report.fail("forward: %s", status.message);
  expect_all_guards(report, "forward", {&out.y, &out.mean, &out.rstd, &out.var, &workspace});
  return out;
}

void check_forward(Report& report, const Level& level, const Terms& direct, const ForwardOutputs& out) {
  const ConvCase& k = level.k;
  const Terms y = level.numerics.allow_winograd ? winograd_terms(direct, k.shape.k) : direct;
  const double units = sum_length_units(k, true), noise = level.noise(k.has_norm ? 1 : 0);
  expect_terms(report, "y", read_row(out.y, k.shape.dtype), y, k.shape.dtype, k.stat(), units, noise);
  if (!k.stats) return;
  const Statistics expected = statistics(read_row(out.y, k.shape.dtype), k.shape.k, k.shape.dtype);
  const Values rstd = read_row(out.rstd, k.stat());
  Values var = read_row(out.var, k.stat());
  const int64_t per_channel = k.shape.y_numel() / k.shape.k;
  const auto expect = [&](const char* what, const Values& got, const Terms& terms) {
    expect_terms(report, what, got, terms, k.stat(), k.stat(), sum_units(per_channel), 0, NotFinite::kAny);
  };
  expect("mean", read_row(out.mean, k.stat()), expected.mean);
  if (k.wants_var()) expect("var", var, expected.var);
  for (size_t c = 0; c < rstd.size(); ++c) {
    const double of_var = k.wants_var() ? var[c] : expected.var.value[c], from_var = 1 / std::sqrt(of_var + kEps);
    // Without the variance it was made of, what that may be off by.
    const double var_error =
        k.wants_var() ? 0 : bound(of_var, expected.var.scale[c], k.stat(), k.stat(), sum_units(per_channel));
    const double limit = 4 * rounding_unit(k.stat()) * from_var + from_var * from_var * from_var * var_error / 2;
    if (std::isfinite(from_var) ? !(std::abs(rstd[c] - from_var) <= limit) : std::isfinite(rstd[c])) {
      report.fail("rstd[%zu] = %.17g of variance %.17g: off by %.3g, allowed %.3g", c, rstd[c], of_var,
                  std::abs(rstd[c] - from_var), limit);
    }
  }
}

struct DataOutputs {
  Guarded dx, dweight, dbias;
};

DataOutputs data_outputs(const ConvCase& k) {
  return {conv_output(k, k.shape.x_numel()), stat_output(k, k.shape.c), stat_output(k, k.shape.c)};
}

ConvBackwardData data_problem(const ConvCase& k, ConvData& d, const ConvNumerics& numerics, const Runner& runner,
                              DataOutputs& out, Guarded& workspace) {
  ConvBackwardData p;
  p.shape = k.shape;
  p.dy = conv_gradient(k, d);
  p.weight = conv_weight(k, d);
  p.x = conv_input(k, d);
  if (!k.has_norm) p.x.data = nullptr;
  p.dweight = out.dweight.data(), p.dbias = out.dbias.data();
  if (k.skip != Skip::kNone) p.skip = d.skip_bytes.data();
  if (k.skip == Skip::kMask) p.skip_mask = d.skip_mask.data();
  p.dx = out.dx.data();
  p.numerics = numerics;
  p.workspace = workspace.data();
  p.runner = runner;
  return p;
}

DataOutputs run_data(Report& report, const ConvCase& k, ConvData& d, const ConvNumerics& numerics,
                     const Runner& runner) {
  DataOutputs out = data_outputs(k);
  Guarded workspace(cpu::conv_backward_data_workspace(k.shape, numerics, runner.threads));
  const Status status = cpu::conv_backward_data(data_problem(k, d, numerics, runner, out, workspace));
  if (!status.ok()) report.fail("data gradient: %s", status.message);
  expect_all_guards(report, "data gradient", {&out.dx, &out.dweight, &out.dbias, &workspace});
  return out;
}

// dx from the gradient of the operand.
Terms data_epilogue(const ConvCase& k, const ConvData& d, Terms dx) {
  for_elements(dx.value.size(), k.shape.c, [&](size_t i, int64_t c) {
    if (k.skip != Skip::kNone) {
      dx.value[i] += d.skip.value[i];
      dx.scale[i] += d.skip.scale[i];
    }
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
    }
  });
  return dx;
}

void check_data(Report& report, const Level& level, const ConvData& d, const Terms& direct, const DataOutputs& out) {
  const ConvCase& k = level.k;
  const Terms dx = data_epilogue(k, d, level.numerics.allow_winograd ? winograd_terms(direct, k.shape.c) : direct);
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

WeightOutputs weight_outputs(const ConvCase& k, const ConvData& d) {
  const int64_t count = static_cast<int64_t>(d.weight.value.size()), unit = element_size(k.weight_dtype());
  return {Guarded(count * unit, k.misaligned ? unit : 0), stat_output(k, k.shape.k)};
}

ConvBackwardWeight weight_problem(const ConvCase& k, ConvData& d, const ConvNumerics& numerics, const Runner& runner,
                                  WeightOutputs& out, Guarded& workspace) {
  ConvBackwardWeight p;
  p.shape = k.shape;
  p.dy = conv_gradient(k, d);
  p.x = conv_input(k, d);
  p.dweight = out.dweight.data();
  p.layout = weight_strides(k);
  if (k.dbias) p.dbias = out.dbias.data();
  p.numerics = numerics;
  p.workspace = workspace.data();
  p.runner = runner;
  return p;
}

WeightOutputs run_weight(Report& report, const ConvCase& k, ConvData& d, const ConvNumerics& numerics,
                         const Runner& runner) {
  WeightOutputs out = weight_outputs(k, d);
  Guarded workspace(cpu::conv_backward_weight_workspace(k.shape, numerics, runner.threads));
  const Status status = cpu::conv_backward_weight(weight_problem(k, d, numerics, runner, out, workspace));
  if (!status.ok()) report.fail("weight gradient: %s", status.message);
  expect_all_guards(report, "weight gradient", {&out.dweight, &out.dbias, &workspace});
  return out;
}

void check_weight(Report& report, const Level& level, const ConvData& d, const Terms& dweight,
                  const WeightOutputs& out) {
  const ConvCase& k = level.k;
  const int64_t count = k.shape.y_numel() / k.shape.k, unit = element_size(k.weight_dtype());
  Values got;
  for_weight(k.shape, weight_strides(k),
             [&](size_t, int64_t at) { got.push_back(decode(out.dweight.data() + at * unit, k.weight_dtype())); });
  const int rounded_operands = (k.has_norm ? 1 : 0) + (k.gradient_norm() ? 1 : 0);
  // An operand of bfloat16 has about so many values: thousands of pixels repeat them, and what they are rounded by.
  constexpr double kValues = 512;
  const double repeats = k.together > 0 ? std::sqrt(static_cast<double>(count) / kValues) : 1;
  expect_terms(report, "dweight", got, dweight, k.weight_dtype(), k.stat(), sum_units(count),
               repeats * level.noise(rounded_operands));
  if (!k.dbias) return;
  Terms dz;
  dz.value = d.dz.value, dz.scale = d.dz.scale, dz.noise.assign(dz.value.size(), 0);
  expect_terms(report, "dbias", read_row(out.dbias, k.stat()),
               channel_sums(dz, k.shape.k, 1, [](size_t, size_t) { return 1.0; }), k.stat(), k.stat(), sum_units(count),
               0, NotFinite::kAny);
}

// Both in one call: the bits of two.
void check_both(Report& report, const ConvCase& k, ConvData& d, const ConvNumerics& numerics, const Runner& runner,
                const DataOutputs& data, const WeightOutputs& weight) {
  DataOutputs both_data = data_outputs(k);
  WeightOutputs both_weight = weight_outputs(k, d);
  Guarded first(cpu::conv_backward_data_workspace(k.shape, numerics, runner.threads));
  Guarded second(cpu::conv_backward_weight_workspace(k.shape, numerics, runner.threads));
  const Status status = cpu::conv_backward(data_problem(k, d, numerics, runner, both_data, first),
                                           weight_problem(k, d, numerics, runner, both_weight, second));
  if (!status.ok()) report.fail("both gradients: %s", status.message);
  if (runner.threads <= k.together && !cpu::conv_runs_together(k.shape, numerics, runner.threads)) {
    report.fail("the gradients are not together");
  }
  expect_all_guards(
      report, "both gradients",
      {&both_data.dx, &both_data.dweight, &both_data.dbias, &both_weight.dweight, &both_weight.dbias, &first, &second});
  expect_same_bytes(report, "dx of both", both_data.dx, data.dx);
  expect_same_bytes(report, "dweight of the norm of both", both_data.dweight, data.dweight);
  expect_same_bytes(report, "dbias of the norm of both", both_data.dbias, data.dbias);
  expect_same_bytes(report, "dweight of both", both_weight.dweight, weight.dweight);
  expect_same_bytes(report, "dbias of both", both_weight.dbias, weight.dbias);
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
    if (k.skip != Skip::kNone) y.value[i] += d.added.value[i], y.scale[i] += d.added.scale[i];
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
    for (const ConvNumerics& numerics : numerics_of(isa, s)) {
      const Level level{isa, k, numerics};
      const ForwardOutputs forward = run_forward(report, k, d, numerics, {});
      check_forward(report, level, y, forward);
      const DataOutputs data = run_data(report, k, d, numerics, {});
      check_data(report, level, d, dx, data);
      for (const Runner& runner : runners(k)) {
        const ForwardOutputs again = run_forward(report, k, d, numerics, runner);
        expect_same_bytes(report, "y", again.y, forward.y);
        expect_same_bytes(report, "mean", again.mean, forward.mean);
        expect_same_bytes(report, "rstd", again.rstd, forward.rstd);
        const DataOutputs repeated = run_data(report, k, d, numerics, runner);
        expect_same_bytes(report, "dx", repeated.dx, data.dx);
        expect_same_bytes(report, "dweight of the norm", repeated.dweight, data.dweight);
        expect_same_bytes(report, "dbias of the norm", repeated.dbias, data.dbias);
      }
    }
    for (const ConvNumerics& numerics : numerics_of(isa, s)) {
      const WeightOutputs weight = run_weight(report, k, d, numerics, {});
      const Terms mixed = winograd_terms(dweight, s.k * s.c, kWinogradWeightUnits);
      check_weight(report, {isa, k, numerics}, d, numerics.allow_winograd ? mixed : dweight, weight);
      const DataOutputs data = run_data(report, k, d, numerics, {});
      check_both(report, k, d, numerics, {}, data, weight);
      for (const Runner& runner : runners(k)) {
        const WeightOutputs again = run_weight(report, k, d, numerics, runner);
        expect_same_bytes(report, "dweight", again.dweight, weight.dweight);
        expect_same_bytes(report, "dbias", again.dbias, weight.dbias);
        check_both(report, k, d, numerics, runner, data, weight);
      }
    }
  }
}

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
    // packed columns by their remainder, of several images, one alone at the end
    {4, 5, 6, 33, 9, 3, 3, 2, 2, 1, 1},
    {3, 14, 13, 33, 20, 3, 3, 2, 2, 1, 1},
    {5, 9, 10, 64, 33, 3, 3, 3, 3, 1, 1},
    {3, 6, 11, 32, 17, 5, 5, 1, 3, 2, 2},
    {3, 7, 9, 36, 16, 3, 3, 2, 2, 2, 2, 2, 2},
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
    {2, 5, 6, 16, 33, 1, 3},
    {2, 5, 6, 33, 16, 1, 3, 1, 1, 0, 2},
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
    {1, 5, 6, 32, 160, 3, 3, 1, 1, 1, 1, 1, 1, 4},
    {2, 4, 5, 64, 96, 1, 1, 1, 1, 0, 0, 1, 1, 2},
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
    // packed pixels with a cache line between them
    {2, 3, 5, 512, 40, 1, 1, 2, 2},
    {1, 5, 6, 1024, 33, 1, 1},
    {1, 3, 5, 1024, 260, 1, 1},
    {1, 5, 5, 512, 256, 1, 1, 2, 2},
    {1, 7, 9, 256, 33, 3, 3, 2, 2, 1, 1},
    {1, 4, 4, 512, 36, 1, 1, 1, 1, 0, 0, 1, 1, 2},
};
// Work enough for threads: a million multiplications.
constexpr Extent kTeam[] = {
    {1, 9, 9, 33, 65, 3, 3, 1, 1, 1, 1},
    {3, 7, 7, 32, 36, 3, 3, 1, 1, 1, 1},
    {2, 16, 16, 33, 65, 1, 1},
    {1, 16, 15, 32, 65, 3, 3, 2, 2, 1, 1},
    {3, 15, 14, 64, 65, 3, 3, 2, 2, 1, 1},
    {1, 24, 24, 3, 65, 7, 7, 2, 2, 3, 3},
    {1, 8, 8, 68, 68, 3, 3, 1, 1, 1, 1, 1, 1, 2},
    {4, 15, 28, 72, 72, 3, 3, 1, 1, 1, 1, 1, 1, 18},
};
// Pixels for slices that both gradients share out, of one thread and of several; the last unit of each is short.
constexpr Extent kTogether[] = {{1, 75, 73, 34, 40, 1, 1}, {3, 64, 65, 17, 136, 1, 1}};
// For every combination of what stands before and after.
constexpr Extent kOptions[] = {{2, 5, 6, 17, 33, 3, 3, 1, 1, 1, 1},
                               {1, 7, 5, 34, 13, 1, 1},
                               {1, 6, 8, 9, 18, 3, 3, 2, 2, 1, 1},
                               {2, 5, 7, 20, 20, 3, 3, 1, 1, 1, 1, 1, 1, 5},
                               {1, 6, 7, 64, 33, 1, 1}};  // the gradient is in whole tiles of whole vectors

// For floats in parts: many channels both ways, more than one block of steps, several panels and images a unit.
constexpr Extent kSplit[] = {
    {1, 7, 5, 34, 36, 1, 1},
    {5, 7, 7, 40, 70, 3, 3, 1, 1, 1, 1},
    {1, 6, 7, 65, 33, 3, 3, 2, 2, 1, 1},
    {1, 4, 5, 130, 37, 3, 3, 1, 1, 1, 1},
    {1, 3, 6, 37, 133, 3, 3, 1, 1, 1, 1},
    {1, 3, 6, 1024, 36, 1, 1},
    {1, 75, 73, 34, 40, 1, 1},
};

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
  k.float_weight = element_size(dtype) == 2 && random.next() % 2 == 0;
  return k;
}

}  // namespace

void test_conv(Report& report, const std::vector<CpuIsa>& all) {
  uint64_t seed = 0;
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const std::vector<CpuIsa> levels = own_levels(all, "conv", dtype);
    for (const Extent& e : kShapes) run_case(report, levels, random_case(e, dtype, ++seed));
    for (const Extent& e : kTeam) {
      ConvCase k = random_case(e, dtype, ++seed);
      k.threads = true;
      run_case(report, levels, k);
    }
    for (const Extent& e : kTogether) {
      for (Gradient dy :
           {Gradient::kPlain, Gradient::kMask, Gradient::kFixed, Gradient::kBatch, Gradient::kBatchMask}) {
        ConvCase k = random_case(e, dtype, ++seed);
        k.dy = dy;
        k.act = Activation::kRelu;         // sums of thousands of nearly equal values do not round as if at random
        k.dbias = dy == Gradient::kBatch;  // summed before it is rounded, or else not at all
        k.threads = true;
        k.together = e.n == 1 ? 1 : 2;
        run_case(report, levels, k);
      }
    }
    for (const Extent& e : kSplit) {
      if (dtype != DType::kFloat32) continue;
      run_case(report, levels, random_case(e, dtype, ++seed));
      for (Special special : {Special::kHuge, Special::kSmall, Special::kTiny}) {
        ConvCase k = random_case(e, dtype, ++seed);
        k.has_norm = k.bias = k.stats = false;  // the squares of these values are no floats
        k.dy = Gradient::kPlain;
        k.skip = Skip::kNone;
        k.special = special;
        k.threads = true;
        run_case(report, levels, k);
      }
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
          k.dbias = skip > 0;
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
