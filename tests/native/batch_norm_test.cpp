// Batch norm + residual + activation: every kernel of a backend against the reference, over
// shapes that end in every part of a vector and of a chunk.
#include "fused_resnet/batch_norm.h"

#include "compare.h"
#include "tests.h"

namespace fused_resnet::native_test {
namespace {

enum class ResidualForm { kNone, kAdd, kDual };
enum class Tensor { kX, kResidual, kDy, kOut, kDresidual };  // kOut: y and dx

struct Case {
  Shape shape;
  Activation act;
  ResidualForm residual;
  bool training, residual_training, mask;
  int variant;  // varies what is absent and what is misaligned
  bool weight() const { return variant % 3 != 1; }
  bool bias() const { return variant % 3 == 0; }
  // All, or a single one.
  bool misaligned(Tensor tensor) const {
    return variant % 4 == 3 || (variant % 8 == 5 && variant / 8 % 5 == static_cast<int>(tensor));
  }
  bool wants_dx() const { return variant % 7 != 5; }
  bool wants_dresidual() const { return variant % 5 != 3; }
  bool wants_parameters() const { return variant % 7 != 6; }
};

std::string name_of(const Case& k) {
  static constexpr const char* kForms[] = {"plain", "residual", "dual"};
  return shape_name(k.shape) + " " + activation_name(k.act) + " " + kForms[static_cast<int>(k.residual)] +
         (k.training ? " train" : " eval") + (k.residual_training ? "+train" : "") + (k.mask ? " mask" : "") +
         " variant " + std::to_string(k.variant % 840);
}

// Roundings behind one value of `pre`: those of the batch's statistics among them.
double pre_units(const Case& k) {
  return k.training || k.residual_training ? sum_units(k.shape.per_channel()) : kElementUnits;
}

// One normalisation's operands, as values and as the kernel's arrays.
struct NormData {
  ReferenceNorm reference;
  Guarded weight, bias, mean, rstd, var;
};

struct Data {
  Values x, residual, dy;
  Guarded x_bytes, residual_bytes, dy_bytes, slope;
  NormData norm, residual_norm;
  ReferenceAct act;
};

Values random_tensor(Random& random, const Shape& shape) {
  Values centre, spread, values;
  for (int64_t c = 0; c < shape.c; ++c)
    centre.push_back(random.uniform(-4, 4)), spread.push_back(random.uniform(0.5, 2));
  for (int64_t n = 0; n < shape.n; ++n)
    for (size_t c = 0; c < centre.size(); ++c)
      for (int64_t s = 0; s < shape.s; ++s)
        values.push_back(rounded(centre[c] + spread[c] * random.bell(), shape.dtype));
  return values;
}

Values random_channels(Random& random, const Shape& shape, double low, double high) {
  Values values;
  for (int64_t c = 0; c < shape.c; ++c) values.push_back(rounded(random.uniform(low, high), stat_dtype(shape.dtype)));
  return values;
}

NormData make_norm(Random& random, const Case& k, const Values& x, bool training) {
  const DType stat = stat_dtype(k.shape.dtype);
  NormData out;
  ReferenceNorm& norm = out.reference;
  norm.batch_stats = training;
  norm.eps = k.variant % 2 == 0 ? 1e-5 : 1e-3;
  if (k.weight()) norm.weight = random_channels(random, k.shape, -1.5, 1.5);
  if (k.bias()) norm.bias = random_channels(random, k.shape, -1, 1);
  if (training) {
    batch_statistics(k.shape, x, &norm);
    for (Guarded* array : {&out.mean, &out.rstd, &out.var}) *array = Guarded(k.shape.c * stat_size(k.shape.dtype));
  } else {
    norm.mean = random_channels(random, k.shape, -4, 4);
    norm.rstd = random_channels(random, k.shape, 0.3, 2);
    out.mean = channel_array(norm.mean, stat), out.rstd = channel_array(norm.rstd, stat);
  }
  out.weight = channel_array(norm.weight, stat), out.bias = channel_array(norm.bias, stat);
  return out;
}

Data make_data(const Case& k) {
  Random random(static_cast<uint64_t>(k.variant) * 1000003u + static_cast<uint64_t>(k.shape.numel()));
  Data d;
  d.x = random_tensor(random, k.shape);
  d.norm = make_norm(random, k, d.x, k.training);
  if (k.residual != ResidualForm::kNone) d.residual = random_tensor(random, k.shape);
  if (k.residual == ResidualForm::kDual) d.residual_norm = make_norm(random, k, d.residual, k.residual_training);
  d.act = {k.act, 0.125, random_channels(random, k.shape, -0.5, 0.5)};
  d.slope = channel_array(d.act.slope, stat_dtype(k.shape.dtype));
  d.x_bytes = input_tensor(k.shape, d.x, k.misaligned(Tensor::kX));
  d.residual_bytes = input_tensor(k.shape, d.residual.empty() ? d.x : d.residual, k.misaligned(Tensor::kResidual));
  return d;
}

NormParams params(NormData& data, Guarded* mean, Guarded* rstd, Guarded* var) {
  NormParams p;
  p.batch_stats = data.reference.batch_stats;
  p.eps = data.reference.eps;
  p.weight = data.reference.weight.empty() ? nullptr : data.weight.data();
  p.bias = data.reference.bias.empty() ? nullptr : data.bias.data();
  p.mean = mean->data(), p.rstd = rstd->data();
  if (p.batch_stats && var != nullptr) p.var = var->data();
  return p;
}

ActParams act_params(const Data& d) {
  ActParams p;
  p.kind = d.act.kind;
  p.negative_slope = d.act.negative_slope;
  if (p.kind == Activation::kPrelu) p.slope = d.slope.data();
  return p;
}

// ------------------------------------------------------------------- forward

struct ForwardOutputs {
  Guarded y, mask, workspace;
  Guarded mean, rstd, var, residual_mean, residual_rstd, residual_var;
  Status status;
};

Guarded statistics_array(const Case& k, bool training, const Guarded& given) {
  if (training) return Guarded(k.shape.c * stat_size(k.shape.dtype));
  Guarded copy(given.size());
  std::memcpy(copy.data(), given.data(), static_cast<size_t>(given.size()));
  return copy;
}

ForwardOutputs run_forward(const Backend& backend, const Case& k, Data& d, const Way& way) {
  ForwardOutputs out;
  out.y = output_tensor(k.shape, k.misaligned(Tensor::kOut));
  out.mask = Guarded(mask_bytes(k.shape));
  out.workspace = Guarded(backend.forward_workspace(k.shape));
  out.mean = statistics_array(k, k.training, d.norm.mean), out.rstd = statistics_array(k, k.training, d.norm.rstd);
  out.var = Guarded(k.shape.c * stat_size(k.shape.dtype));
  BatchNormActForward p;
  p.shape = k.shape;
  p.x = d.x_bytes.data();
  p.norm = params(d.norm, &out.mean, &out.rstd, &out.var);
  if (k.residual != ResidualForm::kNone) p.residual = d.residual_bytes.data();
  if (k.residual == ResidualForm::kDual) {
    p.residual_has_norm = true;
    out.residual_mean = statistics_array(k, k.residual_training, d.residual_norm.mean);
    out.residual_rstd = statistics_array(k, k.residual_training, d.residual_norm.rstd);
    p.residual_norm = params(d.residual_norm, &out.residual_mean, &out.residual_rstd, nullptr);
  }
  p.act = act_params(d);
  p.y = out.y.data();
  if (k.mask) p.mask = out.mask.data();
  p.workspace = out.workspace.data();
  out.status = run(backend, backend.forward, p, way);
  return out;
}

void check_statistics(Report& report, const char* which, const Case& k, const ReferenceNorm& norm, const Guarded& mean,
                      const Guarded& rstd, const Guarded& var) {
  const DType stat = stat_dtype(k.shape.dtype);
  const double units = sum_units(k.shape.per_channel());
  Result expected_mean{norm.mean, norm.mean}, expected_rstd{norm.rstd, norm.rstd}, expected_var{norm.var, norm.var};
  for (size_t c = 0; c < norm.mean.size(); ++c) expected_mean.scale[c] = std::sqrt(norm.var[c]);
  const std::string name = which;
  expect_close(report, (name + "mean").c_str(), read_channels(mean, stat), expected_mean, stat, stat, units);
  expect_close(report, (name + "rstd").c_str(), read_channels(rstd, stat), expected_rstd, stat, stat, units);
  if (var.size() > 0) {
    expect_close(report, (name + "var").c_str(), read_channels(var, stat), expected_var, stat, stat, units);
  }
}

void check_forward(Report& report, const Case& k, const Data& d, const ForwardOutputs& out, const Result& pre) {
  const DType stat = stat_dtype(k.shape.dtype);
  if (k.training) check_statistics(report, "", k, d.norm.reference, out.mean, out.rstd, out.var);
  if (k.residual_training) {
    check_statistics(report, "residual ", k, d.residual_norm.reference, out.residual_mean, out.residual_rstd, {});
  }
  expect_close(report, "y", read_tensor(k.shape, out.y), activated(k.shape, pre, d.act), k.shape.dtype, stat,
               pre_units(k));
  for (int64_t n = 0; k.mask && n < k.shape.n; ++n) {
    for (int64_t c = 0; c < k.shape.c; ++c) {
      for (int64_t s = 0; s < k.shape.s; ++s) {
        const size_t i = at(k.shape, n, c, s);
        const bool certain = std::abs(pre.value[i]) > pre_units(k) * rounding_unit(stat) * pre.scale[i];
        if (certain && mask_bit(k.shape, out.mask, n, c, s) != (pre.value[i] > 0)) report.fail("mask bit %zu", i);
      }
    }
  }
  expect_guards(report, "y", out.y);
  expect_guards(report, "mask", out.mask);
  expect_guards(report, "forward workspace", out.workspace);
  for (const Guarded* array : {&out.mean, &out.rstd, &out.var}) expect_guards(report, "statistics", *array);
}

void check_forward_repeats(Report& report, const Case& k, const ForwardOutputs& again, const ForwardOutputs& serial) {
  if (!again.status.ok()) return report.fail("forward again: %s", again.status.message);
  expect_same_bytes(report, "y", again.y, serial.y);
  expect_same_bytes(report, "mean", again.mean, serial.mean);
  expect_same_bytes(report, "rstd", again.rstd, serial.rstd);
  if (k.mask) expect_same_bytes(report, "mask", again.mask, serial.mask);
}

// ------------------------------------------------------------------ backward

struct BackwardOutputs {
  Guarded dx, dresidual, workspace;
  Guarded dweight, dbias, dresidual_weight, dresidual_bias, dslope;
  Status status;
};

BackwardOutputs run_backward(const Backend& backend, const Case& k, Data& d, ForwardOutputs& saved, const Way& way) {
  BackwardOutputs out;
  out.dx = output_tensor(k.shape, k.misaligned(Tensor::kOut));
  out.dresidual = output_tensor(k.shape, k.misaligned(Tensor::kDresidual));
  out.workspace = Guarded(backend.backward_workspace(k.shape));
  for (Guarded* array : {&out.dweight, &out.dbias, &out.dresidual_weight, &out.dresidual_bias, &out.dslope}) {
    *array = Guarded(k.shape.c * stat_size(k.shape.dtype));
  }
  BatchNormActBackward p;
  p.shape = k.shape;
  p.dy = d.dy_bytes.data(), p.x = d.x_bytes.data();
  p.norm = params(d.norm, &saved.mean, &saved.rstd, nullptr);
  const bool needs_residual = !k.mask || k.residual == ResidualForm::kDual;
  if (k.residual != ResidualForm::kNone && needs_residual) p.residual = d.residual_bytes.data();
  if (k.residual == ResidualForm::kDual) {
    p.residual_has_norm = true;
    p.residual_norm = params(d.residual_norm, &saved.residual_mean, &saved.residual_rstd, nullptr);
    if (k.wants_parameters()) {
      p.dresidual_weight = out.dresidual_weight.data(), p.dresidual_bias = out.dresidual_bias.data();
    }
  }
  p.act = act_params(d);
  if (k.mask) p.mask = saved.mask.data();
  if (k.wants_dx()) p.dx = out.dx.data();
  if (k.residual != ResidualForm::kNone && k.wants_dresidual()) p.dresidual = out.dresidual.data();
  if (k.wants_parameters()) p.dweight = out.dweight.data(), p.dbias = out.dbias.data();
  if (k.act == Activation::kPrelu && k.wants_parameters()) p.dslope = out.dslope.data();
  p.workspace = out.workspace.data();
  out.status = run(backend, backend.backward, p, way);
  return out;
}

// The gradient is zero where rounding decides on which side of a kink an element lies.
Values random_gradient(Random& random, const Case& k, const Result& pre) {
  Values dy;
  const double unsure = 2 * pre_units(k) * rounding_unit(stat_dtype(k.shape.dtype));
  for (size_t i = 0; i < pre.value.size(); ++i) {
    const bool kink = has_kink(k.act) && std::abs(pre.value[i]) <= unsure * pre.scale[i];
    dy.push_back(kink ? 0 : rounded(random.bell() + 0.25, k.shape.dtype));
  }
  return dy;
}

void check_backward(Report& report, const Case& k, const Gradients& expected, const BackwardOutputs& out) {
  const DType dtype = k.shape.dtype, stat = stat_dtype(dtype);
  const double units = sum_units(k.shape.per_channel());
  auto channels = [&](const char* what, const Guarded& got, const Result& result) {
    expect_close(report, what, read_channels(got, stat), result, stat, stat, units);
    expect_guards(report, what, got);
  };
  if (k.wants_dx()) expect_close(report, "dx", read_tensor(k.shape, out.dx), expected.dx, dtype, stat, units);
  if (k.residual != ResidualForm::kNone && k.wants_dresidual()) {
    expect_close(report, "dresidual", read_tensor(k.shape, out.dresidual), expected.dresidual, dtype, stat, units);
  }
  if (k.wants_parameters()) {
    channels("dweight", out.dweight, expected.dweight);
    channels("dbias", out.dbias, expected.dbias);
    if (k.residual == ResidualForm::kDual) {
      channels("dresidual_weight", out.dresidual_weight, expected.dresidual_weight);
      channels("dresidual_bias", out.dresidual_bias, expected.dresidual_bias);
    }
    if (k.act == Activation::kPrelu) channels("dslope", out.dslope, expected.dslope);
  }
  expect_guards(report, "dx", out.dx);
  expect_guards(report, "dresidual", out.dresidual);
  expect_guards(report, "backward workspace", out.workspace);
}

void check_backward_repeats(Report& report, const BackwardOutputs& again, const BackwardOutputs& serial) {
  if (!again.status.ok()) return report.fail("backward again: %s", again.status.message);
  expect_same_bytes(report, "dx", again.dx, serial.dx);
  expect_same_bytes(report, "dresidual", again.dresidual, serial.dresidual);
  expect_same_bytes(report, "dweight", again.dweight, serial.dweight);
  expect_same_bytes(report, "dbias", again.dbias, serial.dbias);
  expect_same_bytes(report, "dresidual_weight", again.dresidual_weight, serial.dresidual_weight);
  expect_same_bytes(report, "dslope", again.dslope, serial.dslope);
}

void run_case(Report& report, const Backend& backend, const Case& k) {
  report.begin(backend.name + " batch_norm " + name_of(k));
  Data d = make_data(k);
  ForwardOutputs forward = run_forward(backend, k, d, {});
  if (!forward.status.ok()) return report.fail("forward: %s", forward.status.message);
  const ReferenceNorm* residual_norm = k.residual == ResidualForm::kDual ? &d.residual_norm.reference : nullptr;
  const Result pre = pre_activation(k.shape, d.x, d.norm.reference, d.residual, residual_norm);
  check_forward(report, k, d, forward, pre);

  Random random(static_cast<uint64_t>(k.variant));
  d.dy = random_gradient(random, k, pre);
  d.dy_bytes = input_tensor(k.shape, d.dy, k.misaligned(Tensor::kDy));
  BackwardOutputs gradients = run_backward(backend, k, d, forward, {});
  if (!gradients.status.ok()) return report.fail("backward: %s", gradients.status.message);
  check_backward(report, k, backward(k.shape, exact(d.dy), d.x, d.norm.reference, d.residual, residual_norm, d.act),
                 gradients);

  for (const Way& way : backend.other_ways(k.variant, k.shape.numel())) {
    check_forward_repeats(report, k, run_forward(backend, k, d, way), forward);
    check_backward_repeats(report, run_backward(backend, k, d, forward, way), gradients);
  }
}

// ---------------------------------------------------------------------- cases

struct Extent {
  int64_t n, c, s;
};
// Tails: C (NHWC) or S (NCHW) of 1 .. 2 vectors of 4, 8 and 16 lanes and a bit; row
// blocks of 4 and 8.
constexpr Extent kSmall[] = {{1, 1, 1},  {2, 1, 1},   {1, 3, 2},  {2, 5, 3},   {1, 7, 8},   {3, 8, 5},  {1, 9, 15},
                             {2, 15, 7}, {2, 16, 16}, {1, 17, 9}, {1, 24, 31}, {2, 33, 17}, {1, 64, 4}, {1, 2, 100}};
// Several chunks, the last one short; planes longer than a block of sums; rows of
// whole cache lines, which may be streamed; enough channels to merge in parallel.
constexpr Extent kLarge[] = {{2, 7, 5000}, {2, 513, 70}, {3, 1, 9001}, {2, 64, 192}, {16, 300, 15}};
// Groups of 8 on a GPU: whole ones, rows of one element, and channels over more than one block.
constexpr Extent kGroups[] = {{2, 13, 49}, {1, 3, 49}, {3, 65, 4}, {2, 64, 1}, {2, 728, 1}, {1, 728, 9}};
constexpr Extent kManyChannels = {1, 1200, 200};
// Vectors for many rounds: rows of 1, 3 and 20 groups (the last block of channels is short); planes of one group, and
// of less and more than a block. Then more chunks than a GPU merges at once.
constexpr Extent kRoundsNHWC[] = {{1, 8, 5003}, {1, 24, 1600}, {2, 264, 60}};
constexpr Extent kRoundsNCHW[] = {{2500, 1, 8}, {23, 2, 1000}, {7, 2, 2808}};
constexpr Extent kManyChunksNHWC = {1, 8, 160000}, kManyChunksNCHW = {1, 1, 1280000};

// Every activation, form, mode and mask.
template <class F>
void for_all_forms(F f) {
  for (int a = 0; a < kActivationCount; ++a) {
    const auto act = static_cast<Activation>(a);
    for (bool training : {true, false}) {
      f(act, ResidualForm::kNone, training, false, false);
      for (bool mask : {false, true}) {
        if (mask && act != Activation::kRelu && act != Activation::kLeakyRelu) continue;
        f(act, ResidualForm::kAdd, training, false, mask);
        f(act, ResidualForm::kDual, training, training, mask);
        f(act, ResidualForm::kDual, training, !training, mask);
      }
    }
  }
}

// One of each kind, where every element costs time.
template <class F>
void for_main_forms(F f) {
  f(Activation::kRelu, ResidualForm::kNone, true, false, false);
  f(Activation::kRelu, ResidualForm::kAdd, true, false, true);
  f(Activation::kRelu, ResidualForm::kDual, true, true, true);
  f(Activation::kPrelu, ResidualForm::kAdd, true, false, false);
  f(Activation::kSilu, ResidualForm::kDual, false, true, false);
}

}  // namespace

void test_batch_norm(Report& report, const Backend& backend) {
  int variant = 0;
  for (DType dtype : backend.dtypes) {
    for (Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      const auto run_on = [&](const Extent& e) {
        return [&, e](Activation act, ResidualForm residual, bool training, bool residual_training, bool mask) {
          const Shape shape{e.n, e.c, e.s, dtype, layout};
          run_case(report, backend, {shape, act, residual, training, residual_training, mask, variant++});
        };
      };
      for (const Extent& e : kSmall) {
        if (backend.many_rounds) break;  // one step, however many blocks
        for_all_forms(run_on(e));
      }
      for (const Extent& e : kGroups) for_main_forms(run_on(e));
      for (const Extent& e : kLarge) for_main_forms(run_on(e));
      if (backend.many_rows > 0 && dtype == DType::kFloat32) {
        run_on({backend.many_rows, 1, 1})(Activation::kPrelu, ResidualForm::kDual, true, true, false);
      }
      if (layout == Layout::kNHWC) for_main_forms(run_on(kManyChannels));
      if (!backend.many_rounds) continue;
      const bool nhwc = layout == Layout::kNHWC;
      for (const Extent& e : nhwc ? kRoundsNHWC : kRoundsNCHW) for_main_forms(run_on(e));
      if (dtype == DType::kFloat32) {
        const Extent& e = nhwc ? kManyChunksNHWC : kManyChunksNCHW;
        const Shape shape{e.n, e.c, e.s, dtype, layout};
        run_case(report, backend, {shape, Activation::kPrelu, ResidualForm::kDual, true, true, false, 0});
      }
    }
  }
}

}  // namespace fused_resnet::native_test
